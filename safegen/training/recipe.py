"""Trainings, from settings to membranes (SPM, arXiv 2312.16145, Eq. 3–8).

    trajectories of targets and anchors, no gradient                    → x_t at its own timestep
    closed, no gradient, one call: predictions for surrogate, target, anchors
    open, with gradient, one call: predictions for target, anchors
    erasing loss + λ · anchoring loss → clip → step

No prediction pays for a guidance branch (guidance 1 needs none); trajectories are shared by several iterations; x_t is
always queried at the timestep it belongs to (the reference code queries it 33–42 steps too noisy). Several concepts in
one run share anchors, and with them half of the trajectories and most of the closed predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safegen.backend.base import Backend
from safegen.errors import TrainingError
from safegen.membrane.weights import Factor, Membrane
from safegen.training.adversary import adversarial_states
from safegen.training.checkpoint import Checkpoints
from safegen.training.config import TrainConfig, run_digest
from safegen.training.losses import anchoring_loss, effect, erasing_loss, erasing_target, total_loss
from safegen.training.optimiser import Average, new_optimizer, rate_factor
from safegen.training.student import Student
from safegen.training.trajectory import Drawn, Source
from safegen.training.workers import Workers

LEAST_EFFECT = 0.01  # of what was asked for; below it a membrane changes nothing that anyone could see


@dataclass(frozen=True, slots=True)
class Progress:
    """One iteration's figures, means over the concepts of the run.

    Attributes:
        iteration: Its number, from 1.
        erasing: L_era.
        anchoring: L_anc, before λ.
        rate: The learning rate.
        norm: Norm of the gradient, before it was clipped.
    """

    iteration: int
    erasing: float
    anchoring: float
    rate: float
    norm: float


class Trainer:
    """Trains the membranes of one run on one host."""

    def __init__(
        self,
        backend: Backend,
        config: TrainConfig | Sequence[TrainConfig],
        pool: Sequence[str],
        scheduler: Any,
        *,
        workers: Workers | None = None,
    ) -> None:
        """Prepares a training.

        Args:
            backend: The host; its weights are not changed.
            config: Settings; of several concepts, those that agree in all but what is erased.
            pool: Captions that anchors are drawn from; those that name a target should be left out.
            scheduler: The host's scheduler; its noise schedule and kind of prediction are used.
            workers: The processes that train together; by default those of a launcher, if there is one.

        Raises:
            TrainingError: The pool is empty, settings differ, or something that they ask for is not installed.
        """
        self.backend = backend
        self.configs = (config,) if isinstance(config, TrainConfig) else tuple(config)
        self.config = self.configs[0]  # what they agree in
        if any(c.shared() != self.config.shared() for c in self.configs):
            raise TrainingError("the concepts of one run share all settings save for what is erased; start two runs")
        self.workers = workers or Workers.joined()
        self.digest = run_digest(self.configs, pool, backend.sites.architecture)
        self._generator = torch.Generator().manual_seed(self.config.seed)
        self.student = Student(backend, self.configs, self._generator)
        self._optimizer = new_optimizer(self.config, self.student.every)
        self._average = Average(self.config.ema, self.student.every)
        self._scaler = torch.amp.GradScaler(self.student.device.type, enabled=self.config.precision == "float16")
        self._source = Source(self.student, pool, scheduler, self.workers, self._generator)

    def _iteration(self, number: int, drawn: Drawn) -> Progress:
        """Does one step: every concept's losses, one after another on the same anchors, then the optimizer."""
        rate = self.config.learning_rate * rate_factor(self.config, number)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        n, own = self.config.batch, self.workers.own
        ax, at, astates = self._source.anchor_rows(drawn)
        picked = [rows.draw(n * self.workers.count, self._generator) for rows in drawn.targets]
        mine = [
            (own(x), own(t), own(states), own(s[i]))
            for (x, t, states, i), s in zip(picked, drawn.surrogates, strict=True)
        ]
        with torch.no_grad():
            closed = self.student.predict(
                torch.cat([part for x, _, _, _ in mine for part in (x, x)] + [ax]),
                torch.cat([part for _, t, _, _ in mine for part in (t, t)] + [at]),
                torch.cat([part for _, _, states, surrogates in mine for part in (surrogates, states)] + [astates]),
                opened=None,
            )
        anchored = closed[2 * n * len(mine) :]
        figures: list[Tensor] = []
        for k, (x, t, states, surrogates) in enumerate(mine):
            surrogate, target = closed[2 * n * k : 2 * n * (k + 1)].chunk(2)
            if self.config.adversarial_tokens and number % 2:
                states = self._adversarial(k, x, t, surrogates, states, target)
            opened = self.student.predict(
                torch.cat([x, ax]), torch.cat([t, at]), torch.cat([states, astates]), opened=k
            )
            erasing = erasing_loss(opened[:n], surrogate, target, self.config.eta)
            anchoring = anchoring_loss(opened[n:], anchored)
            loss = total_loss(erasing, anchoring, self.config.anchoring)
            if not torch.isfinite(loss):
                raise TrainingError(f"the loss is {loss.item()}; lower learning_rate (now {rate:g})")
            self._scaler.scale(loss).backward()
            figures.append(torch.stack([erasing.detach(), anchoring.detach()]))
        norm = self._step()
        shown = torch.stack(figures).mean(dim=0)
        self.workers.average([shown])
        return Progress(number + 1, shown[0].item(), shown[1].item(), rate, norm)

    def _step(self) -> float:
        """Averages the gradients over the processes, clips them for each concept, steps; returns their mean norm."""
        self._scaler.unscale_(self._optimizer)
        norms: list[float] = []
        for parameters in self.student.parameters:
            self.workers.average([p.grad for p in parameters if p.grad is not None])
            limit = self.config.max_grad_norm or math.inf
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, limit).item())
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._average.update(self.student.every)
        return sum(norms) / len(norms)

    def _adversarial(self, k: int, x: Tensor, t: Tensor, surrogates: Tensor, states: Tensor, target: Tensor) -> Tensor:
        return adversarial_states(
            lambda found: self.student.predict(x, t, found, opened=k), surrogates, states, target,
            tokens=self.config.adversarial_tokens, steps=self.config.adversarial_steps,
            rate=self.config.adversarial_rate,
        )  # fmt: skip

    def run(
        self, report: Callable[[Progress], None] = lambda _: None, checkpoints: Checkpoints | None = None
    ) -> Membrane:
        """Trains the only concept of this run, and returns its membrane; see `run_all`."""
        (membrane,) = self.run_all(report, checkpoints)
        return membrane

    def run_all(
        self, report: Callable[[Progress], None] = lambda _: None, checkpoints: Checkpoints | None = None
    ) -> tuple[Membrane, ...]:
        """Trains, and returns a membrane for each concept.

        Args:
            report: Called after every iteration, in every process.
            checkpoints: Where the run is saved, and goes on from; by the first process of several.

        Raises:
            TrainingError: The loss is not finite, a membrane changes nothing, or a checkpoint is of another run.
        """
        drawn: Drawn | None = None
        start = 0
        if checkpoints is not None and (state := checkpoints.load(self.digest)) is not None:
            start, drawn = self._restore(state)
        with self.student.attached():
            for i in range(start, self.config.iterations):
                if drawn is None or i % self.config.reuse == 0:
                    drawn = self._source.draw()
                report(self._iteration(i, drawn))
                if checkpoints is not None and checkpoints.due(i + 1) and self.workers.rank == 0:
                    checkpoints.save(i + 1, self._state(i + 1, drawn))
            assert drawn is not None
            return self._finished(drawn)

    def probe(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """Returns what an estimate measures: drawing a set of trajectories, and one iteration on one."""
        drawn = self._source.draw()
        return self._source.draw, lambda: self._iteration(0, drawn)

    @torch.no_grad()
    def _finished(self, drawn: Drawn) -> tuple[Membrane, ...]:
        """Puts the average in place, proves that each membrane acts, and returns copies without gradients."""
        if self.config.ema:
            for p, value in zip(self.student.every, self._average.values, strict=True):
                p.copy_(value)
        found: list[Membrane] = []
        chance = torch.Generator().manual_seed(0)
        for k, (config, rows) in enumerate(zip(self.configs, drawn.targets, strict=True)):
            x, t, states, i = rows.draw(8, chance)
            closed = self.student.predict(
                torch.cat([x, x]), torch.cat([t, t]), torch.cat([drawn.surrogates[k][i], states]), opened=None
            )
            surrogate, target = closed.chunk(2)
            moved = effect(
                self.student.predict(x, t, states, opened=k), target, erasing_target(surrogate, target, config.eta)
            )
            if moved < LEAST_EFFECT:
                raise TrainingError(
                    f"the trained membrane of {config.concept!r} changes nothing: it moves the target's prediction by "
                    f"{moved:.2%} of what was asked for, expected at least {LEAST_EFFECT:.0%}; raise learning_rate or "
                    f"iterations, or alpha (scale = alpha / rank is {config.alpha / config.rank:g} here), or lower "
                    "anchoring"
                )
            factors = {
                key: Factor(f.down.detach().cpu().clone(), f.up.detach().cpu().clone(), f.alpha)
                for key, f in self.student.factors[k].items()
            }
            found.append(self.student.membrane(k, factors, {"safegen.training_effect": f"{moved:.3f}"}))
        return tuple(found)

    def _state(self, iteration: int, drawn: Drawn) -> dict[str, Any]:
        """Returns all that the next iterations depend on."""
        return {
            "digest": self.digest,
            "iteration": iteration,
            "parameters": [p.detach() for p in self.student.every],
            "optimizer": self._optimizer.state_dict(),
            "average": self._average.state_dict(),
            "scaler": self._scaler.state_dict(),
            "generator": self._generator.get_state(),
            **drawn.content(),
        }

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> tuple[int, Drawn]:
        """Takes a checkpoint; returns how many iterations it has behind it, and the trajectories in use."""
        for p, value in zip(self.student.every, state["parameters"], strict=True):
            p.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        self._average.load_state_dict(state["average"])
        self._scaler.load_state_dict(state["scaler"])
        self._generator.set_state(state["generator"])
        return state["iteration"], Drawn.of(state)
