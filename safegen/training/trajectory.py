"""Noisy latents to train on: whole trajectories, each x_t kept with the timestep at which it is queried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from torch import Tensor

from safegen.errors import TrainingError
from safegen.training.prompts import Prompts
from safegen.training.student import Student
from safegen.training.workers import Workers

_FLOW = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
_DIFFUSION = ("epsilon", "v_prediction", "sample")


def trajectory_sampler(scheduler: Any) -> Any:
    """Returns a deterministic sampler of the same noise schedule and kind of prediction as the host's scheduler.

    For models that predict noise, v or the clean latents: DDIM with leading steps, so that each step ends exactly at
    the next timestep; latents are never clipped. For flow matching: Euler, x_σ' = x_σ + (σ' - σ) velocity.

    Raises:
        TrainingError: The scheduler's model predicts something else.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if isinstance(scheduler, _FLOW) or kind == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler.from_config(
            scheduler.config, use_dynamic_shifting=False, stochastic_sampling=False
        )
    if kind not in _DIFFUSION:
        raise TrainingError(
            f"{type(scheduler).__name__}: its model predicts {kind!r}; expected one of {', '.join(_DIFFUSION)}, or a "
            "scheduler of flow matching"
        )
    return DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="leading", clip_sample=False, thresholding=False
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """Noisy latents of several prompts along their own trajectories.

    Attributes:
        states: Conditioning of each trajectory, [n, tokens, width].
        x: [steps, n, c, h, w]: x_t of each step.
        t: [steps]: the timestep at which each x_t is queried.
    """

    states: Tensor
    x: Tensor
    t: Tensor

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws `size` (x_t, t, states, trajectory index) at random."""
        steps, n = self.x.shape[:2]
        k = torch.randint(steps, (size,), generator=generator)
        i = torch.randint(n, (size,), generator=generator)
        return self.x[k, i], self.t[k], self.states[i], i

    def part(self, start: int, end: int) -> Rows:
        """Returns trajectories `start` to `end`."""
        return Rows(self.states[start:end], self.x[:, start:end], self.t)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One set of trajectories: of each concept's targets with their surrogates, and of anchors."""

    targets: tuple[Rows, ...]
    surrogates: tuple[Tensor, ...]
    anchors: Rows

    def content(self) -> dict[str, Any]:
        """Returns all that it holds, for a checkpoint."""
        rows = [(r.states, r.x, r.t) for r in (*self.targets, self.anchors)]
        return {"rows": rows, "surrogates": list(self.surrogates)}

    @classmethod
    def of(cls, content: dict[str, Any]) -> Drawn:
        """Takes what `content` returned."""
        rows = [Rows(*tensors) for tensors in content["rows"]]
        return cls(tuple(rows[:-1]), tuple(content["surrogates"]), rows[-1])


class Source:
    """Where the rows of an iteration come from; every process draws the same, and denoises its part."""

    def __init__(
        self,
        student: Student,
        pool: Sequence[str],
        scheduler: Any,
        workers: Workers,
        generator: torch.Generator,
    ) -> None:
        """Encodes the pool.

        Raises:
            TrainingError: The pool is empty, or the scheduler's model predicts something unknown.
        """
        self._student, self._workers, self._generator = student, workers, generator
        self._configs, self._config = student.configs, student.config
        self._sampler = trajectory_sampler(scheduler)
        self._prompts = Prompts(student.backend, student.configs, pool)

    @torch.no_grad()
    def trajectories(self, states: Tensor, permeability: Tensor) -> Rows:
        """Denoises from pure noise and keeps every x_t with its own timestep.

        Args:
            states: Conditioning of each trajectory, [n, tokens, width]; n is a multiple of the number of processes.
            permeability: How far each membrane is open for each of them, [n, membranes].
        """
        self._sampler.set_timesteps(self._config.trajectory_steps)
        channels, height, width = self._student.backend.latent_shape
        if self._config.latent_sizes:
            chosen = int(torch.randint(len(self._config.latent_sizes), (1,), generator=self._generator))
            height = width = self._config.latent_sizes[chosen]
        x = self._workers.own(torch.randn(len(states), channels, height, width, generator=self._generator))
        n, guidance = len(x), self._config.trajectory_guidance
        own, opened = self._workers.own(states), self._workers.own(permeability)
        if guidance > 1:
            own = torch.cat([self._prompts.empty.expand(n, -1, -1), own])
            opened = torch.cat([torch.zeros_like(opened), opened])
        kept: list[Tensor] = []
        for t in self._sampler.timesteps:
            kept.append(x)
            eps = self._student.predict(x.repeat(len(own) // n, 1, 1, 1), t.expand(len(own)), own, opened=opened).cpu()
            if guidance > 1:
                u, c = eps.chunk(2)
                eps = u + guidance * (c - u)
            x = self._sampler.step(eps, t, x).prev_sample
        found = self._workers.gathered(torch.stack(kept, dim=1).to(self._student.device)).cpu()
        return Rows(states, found.transpose(0, 1), self._sampler.timesteps.clone())

    def draw(self) -> Drawn:
        """Draws a set of trajectories, those of all concepts and their anchors in one batch."""
        n = self._config.trajectories * self._workers.count
        pairs = [self._prompts.targets(config, n, self._generator) for config in self._configs]
        states = [targets for targets, _ in pairs] + [self._prompts.anchors(n, self._generator)]
        permeability = torch.zeros(n * len(states), len(self._configs))
        for k in range(len(self._configs)):
            permeability[k * n : k * n + round(self._config.open_share * n), k] = 1.0
        rows = self.trajectories(torch.cat(states), permeability)
        parts = [rows.part(k * n, (k + 1) * n) for k in range(len(states))]
        return Drawn(tuple(parts[:-1]), tuple(surrogates for _, surrogates in pairs), parts[-1])

    def anchor_rows(self, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
        """Draws anchors: half at their own x_t, the rest at a target's (as Eq. 7 has it), some the empty prompt."""
        size = self._config.anchor_batch * self._workers.count
        own = 0 if self._config.anchors == "reference" else size // 2
        x, t, states, _ = drawn.anchors.draw(own, self._generator)
        which = int(torch.randint(len(drawn.targets), (1,), generator=self._generator))
        x2, t2, _, _ = drawn.targets[which].draw(size - own, self._generator)
        states2 = self._prompts.anchors_with_empty(len(x2), size, self._generator)
        found = torch.cat([x, x2]), torch.cat([t, t2]), torch.cat([states, states2])
        return self._workers.own(found[0]), self._workers.own(found[1]), self._workers.own(found[2])
