"""Training membranes: what an iteration costs beside the released algorithm's.

    python benchmarks/training.py [--json] [--part cost] [--rounds 5]

The peer is SPM's released algorithm, written anew with all the predictions that its code makes in an iteration
(Con6924/SPM, train_spm.py and src/engine/train_util.py): a partial denoise with the membrane open and guidance 3, and
every prediction in a call of its own, as a pair with an unconditional row that guidance 1 does not need. Both train on
the same model, threads and dtype, with one target and four anchors an iteration, in turns; times are processor time (so
that other work on the machine does not count) of eight iterations, so that a set of trajectories, which eight share, is
counted in full. Exit code 1 if a floor is missed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import DDIMScheduler
from floors import Floor, command, finish
from rich.console import Console
from torch import Tensor

from safegen import mini
from safegen.backend import backend_of
from safegen.mini import zoo
from safegen.training.anchors import reference_anchors
from safegen.training.config import TrainConfig
from safegen.training.estimate import peak_memory
from safegen.training.losses import erasing_target
from safegen.training.recipe import Trainer

TURN = 8  # iterations timed at a time
ANCHORS = 4
STEPS = 30
console = Console(stderr=True)


class Part(StrEnum):
    """What can be measured."""

    COST = "cost"


class Released:
    """One iteration of the released algorithm, on a membrane of its own."""

    def __init__(self, pipe: Any, config: TrainConfig, pool: tuple[str, ...]) -> None:
        self._trainer = Trainer(backend_of(pipe), config, pool, pipe.scheduler)
        self.student, self._config = self._trainer.student, config
        backend = self.student.backend
        self._empty, self._target = (backend.encode(backend.tokenise([text])) for text in ("", config.targets[0]))
        self._scheduler: Any = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        self._generator = torch.Generator().manual_seed(0)
        self._optimizer = torch.optim.AdamW(self.student.every, lr=config.learning_rate)

    def _guided(self, x: Tensor, t: Tensor, states: Tensor, *, opened: int | None, guidance: float = 1.0) -> Tensor:
        """A prediction as the released code makes it: an unconditional row beside every row, whatever the guidance."""
        rows = torch.cat([self._empty.expand(len(x), -1, -1), states])
        u, c = self.student.predict(torch.cat([x, x]), t.expand(2 * len(x)), rows, opened=opened).chunk(2)
        return u + guidance * (c - u)

    def _noisy(self) -> tuple[Tensor, Tensor]:
        """Denoises k of 30 steps with the membrane open; the timestep is the one that the released code queries."""
        self._scheduler.set_timesteps(STEPS)
        x = torch.randn(1, *self.student.backend.latent_shape, generator=self._generator)
        k = int(torch.randint(1, STEPS, (1,), generator=self._generator))
        with torch.no_grad():
            for t in self._scheduler.timesteps[:k]:
                eps = self._guided(x, t, self._target, opened=0, guidance=3.0)
                x = self._scheduler.step(eps, t, x).prev_sample
        return x, torch.tensor(999 - k * 1000 // STEPS)

    def iterate(self) -> None:
        """Does one iteration: 52 rows on average, 10 of them with gradient."""
        x, t = self._noisy()
        self._optimizer.zero_grad()
        anchors = reference_anchors(self._target[0], ANCHORS, self._generator)
        many = x.expand(ANCHORS, -1, -1, -1)
        with torch.no_grad():
            positive = self._guided(x, t, self._target, opened=None)
            neutral = self._guided(x, t, self._empty, opened=None)
            held = self._guided(many, t, anchors, opened=None)
        wanted = erasing_target(neutral, positive, self._config.eta)
        loss = F.mse_loss(self._guided(x, t, self._target, opened=0), wanted)
        loss = loss + self._config.anchoring * F.mse_loss(self._guided(many, t, anchors, opened=0), held)
        loss.backward()
        self._optimizer.step()

    def turn(self) -> None:
        """Does as many iterations as are timed at a time."""
        for _ in range(TURN):
            self.iterate()


def _ours(
    pipe: Any, config: TrainConfig, pool: tuple[str, ...]
) -> tuple[Trainer, Callable[[], object], list[Callable[[], object]]]:
    """Returns a trainer, a turn of it, and the parts of one whose memory is measured."""
    trainer = Trainer(backend_of(pipe), config, pool, pipe.scheduler)
    draw, iterate = trainer.probe()

    def turn() -> None:
        draw()
        for _ in range(TURN):
            iterate()

    return trainer, turn, [draw, iterate]


def cost(rounds: int) -> tuple[dict[str, Any], list[Floor]]:
    """Measures time and memory of an iteration, ours and the released one, in turns."""
    pipe, plan = mini.load(), zoo.plan("ghost")
    same = TrainConfig(
        concept="ghost", targets=plan.targets, templates=plan.templates, batch=1, anchor_batch=ANCHORS,
        trajectories=1, reuse=TURN,
    )  # fmt: skip
    released = Released(pipe, same, plan.pool)
    ours, turn, parts = _ours(pipe, same, plan.pool)
    saving, _, saving_parts = _ours(pipe, same.model_copy(update={"checkpointing": True}), plan.pool)
    times: list[tuple[float, float]] = []
    for k in range(rounds + 1):
        pair: list[float] = []
        for student, action in ((released.student, released.turn), (ours.student, turn)):
            with student.attached():
                started = time.process_time()
                action()
                pair.append((time.process_time() - started) / TURN)
        console.print(f"round {k}: released {pair[0]:.4f} s, ours {pair[1]:.4f} s an iteration")
        times.append((pair[0], pair[1]))
    del times[0]  # warm-up
    device = ours.student.device

    def peak(student: Any, actions: list[Callable[[], object]]) -> float:
        with student.attached():
            return max(peak_memory(action, device) for action in actions) / 2**20

    memory = peak(released.student, [released.iterate]), peak(ours.student, parts), peak(saving.student, saving_parts)
    ratio = statistics.median(own / peer for peer, own in times)
    results = {
        "seconds an iteration, released": statistics.median(peer for peer, _ in times),
        "seconds an iteration, ours": statistics.median(own for _, own in times),
        "peak MiB beyond the model, released": round(memory[0], 1),
        "peak MiB beyond the model, ours": round(memory[1], 1),
        "peak MiB beyond the model, ours with checkpointing": round(memory[2], 1),
    }
    floors = [
        Floor.at_most("time of an iteration, ours / released", ratio, 1 / 3),
        Floor.at_most("peak memory, ours / released", memory[1] / memory[0], 0.5),
    ]
    return results, floors


def main(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    part: Annotated[list[Part] | None, typer.Option(help="What to measure; all by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing, after one to warm up.")] = 5,
) -> None:
    """Measures what the issue "Training membranes" names."""
    measures = {Part.COST: lambda: cost(rounds)}
    results: dict[str, Any] = {}
    floors: list[Floor] = []
    for one in part or list(Part):
        found, more = measures[one]()
        results |= found
        floors += more
    report = {
        "benchmark": "Training membranes",
        "command": command(__file__),
        "model": "safegen-mini",
        "peer": "SPM's released algorithm, all its predictions",
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "results": results,
    }
    finish(report, floors, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
