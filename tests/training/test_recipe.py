"""Trainings of a few iterations on a tiny pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tiny import applied, draw, same_state, state_of, tiny_sd
from torch import Tensor

from safegen.audit import HmacKey
from safegen.backend import backend_of
from safegen.backend.injection import Injection, Opening
from safegen.errors import AlreadyAppliedError, TrainingError
from safegen.membrane.file import read_membrane, write_membrane
from safegen.membrane.weights import Membrane
from safegen.training.config import TrainConfig
from safegen.training.recipe import Progress, Trainer

POOL = ("a fox", "the robot in a photo", "a mouse", "santa")


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = dict(
        concept="ghost",
        targets=("ghost",),
        templates=(("a {}", "a"), ("photo of the {}", "a photo")),
        iterations=3,
        batch=2,
        anchor_batch=4,
        trajectory_steps=4,
        reuse=2,
        anchoring=1.0,
    )
    return TrainConfig(**values | changes)


def trainer(pipe: Any, **changes: Any) -> Trainer:
    return Trainer(backend_of(pipe), config(**changes), POOL, pipe.scheduler)


def tensors(membrane: Membrane) -> dict[str, Tensor]:
    return dict(membrane.tensors())


class Stop(Exception):  # noqa: N818 - not an error
    """Raised in the middle of a training."""


def stop(_progress: Progress) -> None:
    raise Stop


# What is changed


@pytest.mark.parametrize("fail", [False, True])
def test_only_the_membrane_changes(fail: bool) -> None:
    pipe = tiny_sd()
    parameters = list(pipe.unet.parameters())
    for p in parameters[::3]:
        p.requires_grad_(False)
    flags = [p.requires_grad for p in parameters]
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    before = state_of(*parts)
    training = trainer(pipe)
    fresh = {
        k: v.detach().clone() for k, v in tensors(training.student.membrane(0, training.student.factors[0])).items()
    }
    if fail:
        with pytest.raises(Stop):
            training.run(stop)
    else:
        found = tensors(training.run())
        assert all(not torch.equal(found[k], v) for k, v in fresh.items() if not k.endswith(".alpha"))
    assert [p.requires_grad for p in parameters] == flags
    assert all(p.grad is None for p in parameters)
    assert same_state(before, state_of(*parts))


def test_a_fresh_membrane_changes_nothing_though_fully_open() -> None:
    pipe = tiny_sd()
    training = trainer(pipe, rank=3)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)

    @torch.no_grad()
    def predict() -> Tensor:
        return pipe.unet(x, 500, encoder_hidden_states=states).sample

    base = predict()
    backend = backend_of(pipe)
    injection = Injection(
        backend.denoiser, backend.sites, [training.student.membrane(0, training.student.factors[0])], backend.family
    )
    injection.attach(lambda _a, _k: Opening.of(torch.ones(2, 1), torch.ones(1)), lambda _: None)
    assert torch.equal(predict(), base)
    injection.detach()
    for name, tensor in tensors(training.student.membrane(0, training.student.factors[0])).items():
        if name.endswith("lora_up.weight"):
            assert not tensor.any()
        elif name.endswith("lora_down.weight"):  # Kaiming uniform with a = √5: U(-1/√fan_in, 1/√fan_in)
            bound = tensor[0].numel() ** -0.5
            assert 0.7 * bound < tensor.abs().max() <= bound


def test_the_same_seed_gives_the_same_membrane_whatever_the_global_generator() -> None:
    runs: list[dict[str, Tensor]] = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        pipe = tiny_sd()
        torch.manual_seed(noise)
        np.random.seed(noise)
        state = torch.get_rng_state()
        runs.append(tensors(trainer(pipe, seed=seed).run()))
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = runs
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first if not k.endswith(".alpha"))


def test_what_comes_out_can_be_written_read_and_applied(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    settings = config(surrogate="fox", rank=2, alpha=3.0, learning_rate=0.05)
    membrane = Trainer(backend_of(pipe), settings, POOL, pipe.scheduler).run()
    membrane.check_acts()
    assert (membrane.concept, membrane.targets, membrane.surrogate) == ("ghost", ("ghost",), "fox")
    assert membrane.metadata["safegen.training_digest"] == settings.digest()
    assert TrainConfig.model_validate_json(membrane.metadata["safegen.training"]) == settings
    assert {(f.rank, f.scale) for f in membrane.factors.values()} == {(2, 1.5)}
    assert not any(t.requires_grad for t in tensors(membrane).values())
    write_membrane(membrane, tmp_path / "m.safetensors")
    found = tensors(read_membrane(tmp_path / "m.safetensors"))
    assert all(torch.equal(v, found[k]) for k, v in tensors(membrane).items())
    base = draw(pipe, ["a ghost", "a fox"])
    with applied(pipe, tmp_path, audit_key, membranes=[membrane]):
        ghost, fox = draw(pipe, ["a ghost", "a fox"])
    assert torch.equal(fox, base[1])
    assert not torch.equal(ghost, base[0])


# What is computed


class Seen(NamedTuple):
    """One call of the denoiser."""

    opened: int | Tensor | None
    x: Tensor
    t: Tensor
    states: Tensor
    eps: Tensor


def recorded(training: Trainer) -> list[Seen]:
    """Keeps every prediction of a training from now on."""
    seen: list[Seen] = []
    predict = training.student.predict

    def remembering(x: Tensor, t: Tensor, states: Tensor, *, opened: int | Tensor | None) -> Tensor:
        eps = predict(x, t, states, opened=opened)
        seen.append(Seen(opened, x.detach(), t.detach(), states.detach(), eps.detach()))
        return eps

    training.student.predict = remembering  # pyright: ignore[reportAttributeAccessIssue]
    return seen


def one_iteration(pipe: Any, **changes: Any) -> tuple[Seen, Seen, Progress]:
    """Returns the closed call, the open one, and what was reported."""
    training = trainer(pipe, iterations=1, **changes)
    seen = recorded(training)
    reports: list[Progress] = []
    counts: list[int] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        counts.append(len(seen))

    training.run(report)
    closed, opened = seen[counts[0] - 2 : counts[0]]
    return closed, opened, reports[0]


def test_an_iteration_is_eq_4_and_eq_7_in_two_batches() -> None:
    first, second, report = one_iteration(tiny_sd(), eta=2.0)
    (was_open, x, t, states, closed), (is_open, x2, t2, states2, opened) = first, second
    assert (was_open, is_open) == (None, 0)
    n, anchors = 2, 4
    assert (len(x), len(x2)) == (2 * n + anchors, n + anchors)  # no guidance branch
    # Target rows meet the surrogate at the same x_t; what is open sees the same rows as what is shut.
    assert torch.equal(x[:n], x[n : 2 * n])
    for rows, rows2 in ((x, x2), (t, t2), (states, states2)):
        assert torch.equal(rows[n:], rows2)
    sur, tar, anchored = closed[:n].double(), closed[n : 2 * n].double(), closed[2 * n :].double()
    erasing = (opened[:n].double() - sur + 2.0 * (tar - sur)).pow(2).mean().item()
    anchoring = (opened[n:].double() - anchored).pow(2).mean().item()
    assert report.iteration == 1
    assert report.erasing == pytest.approx(erasing, rel=1e-4)
    assert report.anchoring == pytest.approx(anchoring, rel=1e-4) == 0  # the membrane starts at the base model
    assert erasing > 0


def test_prompts_come_from_the_templates_and_surrogates_are_what_remains() -> None:
    pipe = tiny_sd()
    backend = backend_of(pipe)
    states = one_iteration(pipe)[0].states

    def place(row: Tensor, texts: list[str]) -> int:
        rows = backend.encode(backend.tokenise(texts))
        distances = (rows - row).abs().amax(dim=(1, 2))
        assert distances.min() < 1e-5
        return int(distances.argmin())

    pairs = [
        (place(states[k], ["a", "a photo"]), place(states[2 + k], ["a ghost", "photo of the ghost"])) for k in (0, 1)
    ]
    assert all(surrogate == target for surrogate, target in pairs)
    assert place(states[4 + 2], [""]) == 0  # one anchor is the empty prompt
    for k in (4, 5, 7):
        place(states[k], list(POOL))
    named = one_iteration(pipe, surrogate="fox")[0].states
    assert {place(row, ["a fox", "photo of the fox"]) for row in named[:2]} <= {0, 1}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["ddim leading", "ddim linspace", "ddim trailing", "euler"])
def test_every_x_t_is_queried_at_its_own_timestep(scheduler: str, guidance: float) -> None:
    """x_t goes from step to step by DDIM, and the level that it arrives at is that of the timestep kept with it."""
    pipe = tiny_sd()
    if scheduler == "euler":
        pipe.scheduler = EulerDiscreteScheduler()
    else:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=scheduler[5:])
    training = trainer(pipe, trajectory_steps=6, trajectory_guidance=guidance)
    backend = backend_of(pipe)
    states = backend.encode(backend.tokenise(["a ghost", "a fox"]))
    empty = backend.encode(backend.tokenise([""])).expand(2, -1, -1)
    rows = training._source.trajectories(states, torch.zeros(2, 1))
    alphas = pipe.scheduler.alphas_cumprod
    assert rows.x.shape == (6, 2, 4, 8, 8)
    assert (rows.t.diff() < 0).all()
    assert rows.t[-1] < 10
    assert rows.x[0].std() == pytest.approx(1, abs=0.15)
    with torch.no_grad():
        for k in range(5):
            x, t = rows.x[k], rows.t[k]
            eps = backend.predict(x, t.expand(2), states)
            if guidance > 1:
                free = backend.predict(x, t.expand(2), empty)
                eps = free + guidance * (eps - free)
            x0 = (x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
            reached = alphas[rows.t[k + 1]]
            wanted = reached.sqrt() * x0 + (1 - reached).sqrt() * eps
            torch.testing.assert_close(rows.x[k + 1], wanted, atol=1e-4, rtol=1e-4)


def test_drawn_rows_keep_their_timestep_and_conditioning() -> None:
    pipe = tiny_sd()
    training = trainer(pipe)
    backend = backend_of(pipe)
    states3 = backend.encode(backend.tokenise(["a ghost", "a fox", "a mouse"]))
    rows = training._source.trajectories(states3, torch.zeros(3, 1))
    x, t, states, index = rows.draw(50, torch.Generator().manual_seed(0))
    for k in range(50):
        step = int((rows.t == t[k]).nonzero())
        assert torch.equal(x[k], rows.x[step, index[k]])
        assert torch.equal(states[k], rows.states[index[k]])
    assert set(t.tolist()) == set(rows.t.tolist())
    assert set(index.tolist()) == {0, 1, 2}


def test_trajectories_are_drawn_with_the_membrane_shut_and_shared() -> None:
    training = trainer(tiny_sd(), iterations=5, reuse=2)
    seen = recorded(training)
    training.run()
    steps = ["trajectory"] * 4
    pair = ["closed", "open"]
    kinds = ["trajectory" if isinstance(s.opened, Tensor) else "closed" if s.opened is None else "open" for s in seen]
    assert kinds == (steps + pair * 2) * 2 + steps + pair + pair  # the last pair proves that it acts
    assert not any(s.opened.any() for s in seen if isinstance(s.opened, Tensor))


def test_a_share_of_the_target_trajectories_is_drawn_with_the_membrane_open() -> None:
    training = trainer(tiny_sd(), iterations=1, trajectories=4, open_share=0.5)
    seen = recorded(training)
    training.run()
    (gamma,) = {tuple(s.opened.flatten().tolist()) for s in seen if isinstance(s.opened, Tensor)}
    # unconditional rows of targets and anchors, then conditional ones: two of four targets, no anchor
    assert gamma == (0,) * 8 + (1, 1, 0, 0) + (0,) * 4


# Whether it learns


def test_the_loss_falls() -> None:
    pipe = tiny_sd()
    training = trainer(pipe, iterations=40, learning_rate=0.02, batch=8, reuse=8, rank=4, eta=0.0)
    losses: list[float] = []
    training.run(lambda progress: losses.append(progress.erasing))
    assert len(losses) == 40
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])


def test_anchoring_holds_the_anchors() -> None:
    pipe = tiny_sd()
    moved: list[float] = []
    for weight in (0.0, 100.0):
        last: list[float] = []
        trainer(pipe, iterations=25, learning_rate=0.02, batch=4, anchoring=weight).run(
            lambda progress, last=last: last.append(progress.anchoring)
        )
        moved.append(float(np.mean(last[-5:])))
    assert moved[1] < 0.2 * moved[0]


# What is refused


def test_an_empty_pool_is_refused() -> None:
    pipe = tiny_sd()
    with pytest.raises(TrainingError, match="anchor pool is empty"):
        Trainer(backend_of(pipe), config(), (), pipe.scheduler)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_model_as_it_was() -> None:
    pipe = tiny_sd()
    before = state_of(pipe.unet)
    with pytest.raises(TrainingError, match="lower learning_rate"):
        trainer(pipe, learning_rate=1e30, iterations=5).run()
    assert same_state(before, state_of(pipe.unet))


def test_a_training_that_changed_nothing_is_refused() -> None:
    with pytest.raises(TrainingError, match="changes nothing"):
        trainer(tiny_sd(), learning_rate=1e-12).run()


def test_a_guarded_model_is_not_trained_on(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    early = trainer(pipe)
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    with applied(pipe, tmp_path, audit_key):
        erased, held = draw(pipe, "a ghost"), state_of(pipe.unet)
        with pytest.raises(AlreadyAppliedError):
            trainer(pipe)
        with pytest.raises(AlreadyAppliedError):
            early.run()
        assert same_state(held, state_of(pipe.unet))
        assert torch.equal(draw(pipe, "a ghost"), erased)
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    early.run()  # once the policy is off, it trains
