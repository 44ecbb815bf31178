"""Runs: stopped and gone on with, of several concepts, in several processes, in other precisions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import draw, same_state, state_of, tiny_sd
from together import POOL, settings
from torch import Tensor

from safegen.backend import backend_of
from safegen.errors import TrainingError
from safegen.membrane.file import read_membrane
from safegen.membrane.weights import Membrane
from safegen.training.checkpoint import Checkpoints
from safegen.training.config import TrainConfig
from safegen.training.estimate import estimate, peak_memory
from safegen.training.optimiser import rate_factor
from safegen.training.recipe import Progress, Trainer
from safegen.training.trajectory import trajectory_sampler

ROOT = Path(__file__).parent.parent.parent


def config(**changes: Any) -> TrainConfig:
    return settings(processes=1).model_copy(update=changes)


def trainer(pipe: Any, *configs: TrainConfig) -> Trainer:
    return Trainer(backend_of(pipe), configs, POOL, pipe.scheduler)


def tensors(membrane: Membrane) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in membrane.tensors() if not name.endswith(".alpha")}


class Stop(Exception):  # noqa: N818 - not an error
    """Raised in the middle of a training."""


def stop_after(iterations: int) -> Callable[[Progress], None]:
    def report(now: Progress) -> None:
        if now.iteration == iterations:
            raise Stop

    return report


# Stopped and gone on with


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9, "schedule": "restarts", "warmup": 2, "latent_sizes": (8, 12)},
        {"adversarial_tokens": 3, "anchors": "reference", "weight_decay": 0.1, "max_grad_norm": 0.0},
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    two = [config(**changes), config(concept="fox", targets=("fox",), **changes)]
    whole = trainer(tiny_sd(), *two).run_all()
    checkpoints = Checkpoints(tmp_path, every=1)
    with pytest.raises(Stop):
        trainer(tiny_sd(), *two).run_all(stop_after(4), checkpoints)  # after three, in the middle of a set
    assert checkpoints.latest == 3
    numbers: list[int] = []
    again = trainer(tiny_sd(), *two).run_all(lambda now: numbers.append(now.iteration), checkpoints)
    assert numbers == [4]
    for first, second in zip(whole, again, strict=True):
        found = tensors(second)
        assert all(torch.equal(tensor, found[name]) for name, tensor in tensors(first).items())
        assert first.metadata == second.metadata


def test_the_last_checkpoints_stay_and_half_of_one_is_never_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", every=2, keep=2)
    for k in range(1, 8):
        if checkpoints.due(k):
            checkpoints.save(k, {"digest": "d", "k": torch.tensor(k)})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000004.pt", "step-00000006.pt"]
    (checkpoints.folder / "step-00000008.pt.part").write_bytes(b"half")
    found = checkpoints.load("d")
    assert found is not None
    assert found["k"] == 6
    (checkpoints.folder / "step-00000008.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="step-00000008.pt: this checkpoint cannot be read"):
        checkpoints.load("d")
    checkpoints.clear()
    assert checkpoints.load("d") is None
    assert checkpoints.latest == 0


@pytest.mark.parametrize("change", ["settings", "pool", "model"])
def test_a_checkpoint_of_another_run_is_refused(change: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1)
    trainer(tiny_sd(), config(iterations=1)).run(checkpoints=checkpoints)
    other = config(iterations=1, seed=1 if change == "settings" else 0)
    pipe = tiny_sd(blocks=(16, 16)) if change == "model" else tiny_sd()
    pool = POOL[:2] if change == "pool" else POOL
    with pytest.raises(TrainingError, match="a checkpoint of another training"):
        Trainer(backend_of(pipe), other, pool, pipe.scheduler).run(checkpoints=checkpoints)


# Several concepts


def test_concepts_of_one_run_share_what_is_predicted_with_everything_shut() -> None:
    pipe = tiny_sd()
    both = [config(iterations=1), config(iterations=1, concept="fox", targets=("fox",), surrogate="a mouse")]
    training = trainer(pipe, *both)
    calls: list[tuple[Any, int]] = []
    predict = training.student.predict

    def counted(x: Tensor, t: Tensor, states: Tensor, *, opened: int | Tensor | None) -> Tensor:
        calls.append((None if isinstance(opened, Tensor) else opened, len(x)))
        return predict(x, t, states, opened=opened)

    training.student.predict = counted  # pyright: ignore[reportAttributeAccessIssue]
    seen: list[int] = []
    ghost, fox = training.run_all(lambda _: seen.append(len(calls)))
    assert calls[seen[0] - 3 : seen[0]] == [(None, 4 * 4 + 8), (0, 4 + 8), (1, 4 + 8)]  # the anchors once, not twice
    assert (ghost.concept, fox.concept, fox.surrogate) == ("ghost", "fox", "a mouse")
    mine, other = tensors(ghost), tensors(fox)
    assert not any(torch.equal(mine[name], other[name]) for name in mine)
    assert {ghost.metadata["safegen.training_digest"], fox.metadata["safegen.training_digest"]} == {
        c.digest() for c in both
    }


def test_each_membrane_learns_from_its_own_losses_alone() -> None:
    """With nothing drawn differently, the second concept changes nothing about the first one's gradient."""
    pipe = tiny_sd()
    base = config(iterations=1, learning_rate=1e-3)
    training = trainer(pipe, base, base.model_copy(update={"concept": "fox", "targets": ("fox",)}))
    with training.student.attached():
        drawn = training._source.draw()
        training._iteration(0, drawn)
    ups = [[f.up.grad for f in factors.values()] for factors in training.student.factors]
    assert all(g is not None and g.any() for gradients in ups for g in gradients)
    assert not torch.equal(torch.cat([g.flatten() for g in ups[0]]), torch.cat([g.flatten() for g in ups[1]]))  # type: ignore[union-attr]


def test_concepts_of_one_run_agree_in_their_settings() -> None:
    with pytest.raises(TrainingError, match="share all settings save for what is erased"):
        trainer(tiny_sd(), config(), config(concept="fox", targets=("fox",), eta=2.0))


def test_what_was_named_by_hand_is_held_in_the_targets_own_prompts() -> None:
    pipe = tiny_sd()
    backend = backend_of(pipe)
    templates = (("a {}", "a"), ("photo of the {}", "a photo"))
    training = trainer(pipe, config(neighbours=("mickey",), templates=templates))
    drawn = training._source._prompts.anchors(400, torch.Generator().manual_seed(0))
    wordings = backend.encode(backend.tokenise(["a mickey", "photo of the mickey"]))
    hits = [(drawn - w).abs().amax(dim=(1, 2)).lt(1e-5).float().mean().item() for w in wordings]
    assert hits == pytest.approx([0.15, 0.15], abs=0.06)


# Several processes


def test_two_processes_do_what_one_does_with_the_doubled_batch(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += [str(Path(__file__).with_name("together.py")), str(tmp_path / "m")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    together = tensors(read_membrane(tmp_path / "m"))
    alone = tensors(trainer(tiny_sd(), config()).run())
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=2e-4, rtol=2e-3)


# What a model predicts


def flow(pipe: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler()


def velocity(pipe: Any) -> Any:
    return DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")


@pytest.mark.parametrize("kind", [velocity, flow])
def test_models_that_predict_something_else_are_trained_alike(kind: Callable[[Any], Any]) -> None:
    pipe = tiny_sd()
    pipe.scheduler = kind(pipe)
    changes = {"iterations": 24, "learning_rate": 0.02, "rank": 4, "eta": 0.0, "batch": 8, "anchoring": 0.0, "reuse": 6}
    membrane = trainer(pipe, config(**changes)).run()
    assert 0.3 < float(membrane.metadata["safegen.training_effect"]) < 1.5  # of what was asked for


def test_a_trajectory_of_v_predictions_keeps_each_x_t_at_its_level() -> None:
    pipe = tiny_sd()
    pipe.scheduler = velocity(pipe)
    alphas = pipe.scheduler.alphas_cumprod
    for k, (x, t, v, after, then) in enumerate(steps_of(pipe)):
        a, b = alphas[int(t)], alphas[int(then)]
        clean, noise = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
        torch.testing.assert_close(after, b.sqrt() * clean + (1 - b).sqrt() * noise, atol=1e-4, rtol=1e-4, msg=str(k))


def test_a_trajectory_of_a_flow_is_straight_between_its_levels() -> None:
    pipe = tiny_sd()
    pipe.scheduler = flow(pipe)
    for x, t, v, after, then in steps_of(pipe):
        torch.testing.assert_close(after, x + (then - t) / 1000 * v, atol=1e-4, rtol=1e-4)


def steps_of(pipe: Any) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """For each step of a trajectory: x_t, t, what the model predicts there, and the next two of the first two."""
    training = trainer(pipe, config(trajectory_steps=5, trajectory_guidance=1.0))
    backend = backend_of(pipe)
    states = backend.encode(backend.tokenise(["a ghost", "a fox"]))
    rows = training._source.trajectories(states, torch.zeros(2, 1))
    assert rows.x.shape[:2] == (5, 2)
    assert (rows.t.diff() < 0).all()
    with torch.no_grad():
        predicted = [backend.predict(rows.x[k], rows.t[k].expand(2), states) for k in range(4)]
    return [(rows.x[k], rows.t[k], predicted[k], rows.x[k + 1], rows.t[k + 1]) for k in range(4)]


def test_a_kind_of_prediction_that_nobody_knows_is_refused() -> None:
    scheduler = tiny_sd().scheduler
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(TrainingError, match="its model predicts 'score'; expected one of epsilon"):
        trajectory_sampler(scheduler)


# Precision and memory


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_the_same_and_keeps_float32_factors(precision: Any) -> None:
    changes = {"iterations": 12, "learning_rate": 0.02, "rank": 4, "eta": 0.0, "batch": 8}
    full = trainer(tiny_sd(), config(**changes)).run()
    half = trainer(tiny_sd(), config(**changes, precision=precision)).run()
    first, second = (torch.cat([t.flatten() for t in tensors(m).values()]) for m in (full, half))
    assert second.dtype == torch.float32
    assert not torch.equal(first, second)
    assert torch.cosine_similarity(first, second, dim=0) > 0.9


def test_checkpointing_takes_less_memory_and_changes_nothing_else() -> None:
    pipe = tiny_sd(blocks=(32, 64))
    before = state_of(pipe.unet)
    peaks: list[int] = []
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        training = trainer(pipe, config(batch=16, anchor_batch=16, checkpointing=checkpointing))
        with training.student.attached():
            _, iterate = training.probe()
            peaks.append(peak_memory(iterate, torch.device("cpu")))
        found.append(tensors(trainer(pipe, config(checkpointing=checkpointing)).run()))
    assert peaks[1] < 0.8 * peaks[0]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-4, rtol=1e-3)
    assert same_state(before, state_of(pipe.unet))


def test_peak_memory_is_what_is_held_at_once() -> None:
    def one_after_another() -> None:
        for _ in range(4):
            torch.ones(1 << 20)  # 4 MiB, freed at once

    def together() -> None:
        torch.stack([torch.ones(1 << 20) for _ in range(4)])

    assert peak_memory(one_after_another, torch.device("cpu")) == pytest.approx(4 << 20, rel=0.05)
    assert peak_memory(together, torch.device("cpu")) == pytest.approx(32 << 20, rel=0.05)


def test_an_estimate_is_made_of_one_step_and_leaves_the_model_alone() -> None:
    pipe = tiny_sd()
    before = state_of(pipe.unet)
    found = estimate(trainer(pipe, config(iterations=100, reuse=8)))
    assert found.total == pytest.approx(13 * found.drawing + 100 * found.iteration)
    assert found.peak > 100_000
    assert same_state(before, state_of(pipe.unet))


# Settings


def test_learning_rates_along_the_run() -> None:
    paper = config(schedule="restarts", warmup=500, cycles=3, iterations=3000)
    assert [rate_factor(paper, i) for i in (0, 249, 499)] == pytest.approx([0.002, 0.5, 1.0])
    assert rate_factor(paper, 500) == 1.0
    assert rate_factor(paper, 500 + 2500 // 3 - 5) < 0.03  # the end of the first cosine
    assert rate_factor(paper, 500 + 2500 // 3 + 5) > 0.97  # and the start of the second
    plain = config(iterations=100)
    assert (rate_factor(plain, 0), rate_factor(plain, 50)) == pytest.approx((1.0, 0.51))
    assert rate_factor(plain, 99) < 0.021
    assert {rate_factor(config(schedule="constant"), i) for i in range(4)} == {1.0}


def test_an_8_bit_optimizer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match="adamw8bit needs bitsandbytes.*pip install bitsandbytes"):
        trainer(tiny_sd(), config(optimizer="adamw8bit"))


def test_an_average_lags_behind_what_it_averages() -> None:
    changes = {"iterations": 8, "schedule": "constant", "learning_rate": 0.02}
    last = tensors(trainer(tiny_sd(), config(**changes)).run())
    mean = tensors(trainer(tiny_sd(), config(**changes, ema=0.99)).run())
    ups = [name for name in last if name.endswith("up.weight")]
    shorter = [mean[name].norm() < last[name].norm() for name in ups]
    assert sum(shorter) > 0.9 * len(shorter)


def test_a_scale_that_hides_the_membrane_is_found_out() -> None:
    """What users of the released code met on SDXL: rank 32 with alpha 1, "no difference"."""
    hidden = {"rank": 32, "alpha": 0.01, "learning_rate": 1e-4}
    with pytest.raises(TrainingError, match=r"changes nothing: it moves .*scale = alpha / rank is 0.0003"):
        trainer(tiny_sd(), config(**hidden)).run()


def test_pictures_can_be_drawn_while_it_trains() -> None:
    pipe = tiny_sd()
    base = draw(pipe, ["a ghost"])
    training = trainer(pipe, config(iterations=2, learning_rate=0.05))
    pictures: list[tuple[Tensor, Tensor]] = []

    def report(_: Progress) -> None:
        with training.student.drawing(None):
            shut = draw(pipe, ["a ghost"])
        with training.student.drawing(0):
            pictures.append((shut, draw(pipe, ["a ghost"])))

    watched = tensors(training.run(report))
    assert all(torch.equal(shut, base) and not torch.equal(opened, base) for shut, opened in pictures)
    assert len(pictures) == 2
    alone = tensors(trainer(tiny_sd(), config(iterations=2, learning_rate=0.05)).run())
    assert all(torch.equal(tensor, watched[name]) for name, tensor in alone.items())
