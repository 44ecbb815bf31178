"""LECO (p1atdev/LECO): a LoRA trained to predict the opposite of its target; what SPM started from.

    L = ‖ε_LoRA(x_t, c_tar) - [ε(x_t, c_neutral) - g (ε(x_t, c_tar) - ε(x_t, c_neutral))]‖²

It is SPM's Eq. 4 without anchoring (Eq. 7) and of a higher rank; LECO has a code and no paper. The neutral prompt is
the target's surrogate. x_t is queried at the timestep that it belongs to (the code has the same slip as SPM's).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.evaluation.methods.adapters import Adapters, Adapting
from safegen.evaluation.methods.base import Kind, Target, Task, fewer
from safegen.evaluation.methods.host import Supply, encode
from safegen.evaluation.methods.weights import refuse_not_finite
from safegen.membrane.weights import Membrane


@dataclass(frozen=True, slots=True)
class Leco:
    """LECO.

    Attributes:
        iterations: Iterations; LECO's example takes 500.
        learning_rate: Learning rate of AdamW; LECO's example takes 1e-4.
        rank: Rank of the LoRA.
        alpha: Its α; the scale is α / rank.
        guidance_scale: g.
        batch: Rows an iteration.
        steps: Sampler steps of the trajectories.
        guidance: Their guidance.
        reuse: Iterations that share trajectories.
    """

    name: ClassVar[str] = "leco"
    kind: ClassVar[Kind] = "adapter"
    several: ClassVar[str] = "trained apart, outputs added"

    iterations: int = 80
    learning_rate: float = 3e-3
    rank: int = 4
    alpha: float = 1.0
    guidance_scale: float = 1.0
    batch: int = 4
    steps: int = 12
    guidance: float = 3.0
    reuse: int = 8

    def scaled(self, effort: float) -> Self:
        """See `Method`."""
        return replace(self, iterations=fewer(self.iterations, effort))

    def make(self, pipe: Any, task: Task) -> Adapters:
        """See `Method`.

        Raises:
            TrainingError: The loss is not finite.
        """
        backend = backend_of(pipe)
        return Adapters(tuple(self._train(backend, pipe.scheduler, target, task) for target in task.targets), both=True)

    def _train(self, backend: Backend, scheduler: Any, target: Target, task: Task) -> Membrane:
        generator = torch.Generator().manual_seed(task.seed)
        adapter = Adapting(backend, target, generator, rank=self.rank, alpha=self.alpha)
        optimizer = torch.optim.AdamW(adapter.parameters, lr=self.learning_rate)
        names, neutral = encode(backend, target.names), encode(backend, [target.surrogate])
        supply = Supply(
            backend, scheduler, names, generator, steps=self.steps, guidance=self.guidance, reuse=self.reuse
        )
        with adapter.attached():
            for _ in range(self.iterations):
                with torch.no_grad():
                    x, t, index = supply.draw(adapter.opened, self.batch)
                    both = torch.cat([neutral.expand(len(x), -1, -1), names[index]])
                    eps_neutral, eps_target = adapter.closed(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
                wanted = eps_neutral - self.guidance_scale * (eps_target - eps_neutral)
                loss = (adapter.opened(x, t, names[index]) - wanted).square().mean()
                refuse_not_finite(loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return adapter.membrane()
