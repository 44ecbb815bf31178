"""SPM (arXiv 2312.16145), as its paper states it and as its code was released: they differ exactly where it is said.

    L_era = ‖ε_M(x_t, c_tar) - ε(x_t, c_sur) + η (ε(x_t, c_tar) - ε(x_t, c_sur))‖²        (Eq. 4)
    P(c | c_tar) ∝ (1 - |cos(c, c_tar)|)^α                                               (Eq. 6)
    L_anc = E_c ‖ε_M(x_t, c) - ε(x_t, c)‖²                                               (Eq. 7)
    L = L_era + λ L_anc                                                                  (Eq. 8)

Both train on bare names, one target row and four anchors on the target's x_t, AdamW, a cosine with warm-up and two
restarts. x_t is denoised for every iteration with the membrane open. The released code's random resolutions are left
out: models of a fixed size draw nothing sensible at others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup
from torch import Tensor

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.errors import UsageError
from safegen.evaluation.methods.adapters import Adapters, Adapting, summed
from safegen.evaluation.methods.base import Kind, Target, Task, fewer
from safegen.evaluation.methods.host import Predict, denoise, encode, leading
from safegen.evaluation.methods.weights import refuse_not_finite
from safegen.membrane.weights import Membrane


@dataclass(frozen=True, slots=True)
class SpmPublished:
    """SPM as published: the equations, x_t at its own timestep, anchors from real captions by Eq. 6, outputs added.

    Attributes:
        iterations: Iterations; the paper takes 3,000.
        learning_rate: Highest learning rate; the paper takes 1e-4.
        eta: η of Eq. 4.
        anchoring: λ of Eq. 8; the paper takes 1,000.
        alpha: α of Eq. 6.
        anchors: Anchors an iteration.
        steps: Sampler steps of a whole trajectory.
        guidance: Guidance of the trajectories.
    """

    name: ClassVar[str] = "spm-as-published"
    kind: ClassVar[Kind] = "adapter"
    several: ClassVar[str] = "trained apart, outputs added (Eq. 9)"

    iterations: int = 150
    learning_rate: float = 1e-2
    eta: float = 1.0
    anchoring: float = 10.0
    alpha: float = 1.0
    anchors: int = 4
    steps: int = 30
    guidance: float = 3.0

    def scaled(self, effort: float) -> Self:
        """See `Method`."""
        return replace(self, iterations=fewer(self.iterations, effort))

    def make(self, pipe: Any, task: Task) -> Adapters:
        """See `Method`.

        Raises:
            UsageError: There are no captions to draw anchors from.
            TrainingError: The loss is not finite.
        """
        if not task.keep:
            raise UsageError(f"{self.name}: no captions to keep; expected some, anchors are drawn from them")
        backend = backend_of(pipe)
        membranes = [self._train(backend, pipe.scheduler, target, task) for target in task.targets]
        return Adapters(self.composed(membranes), both=True)

    def composed(self, membranes: Sequence[Membrane]) -> tuple[Membrane, ...]:
        """Returns what is attached for several targets: `y = W x + Σ_c (v_reg,cᵀ x) v_sig,c` (Eq. 9 at γ = 1)."""
        return tuple(membranes)

    def query(self, scheduler: Any, taken: int) -> Tensor:
        """Returns the timestep at which x_t is queried after `taken` of `steps` sampler steps: its own."""
        scheduler.set_timesteps(self.steps)
        return scheduler.timesteps[taken]

    def draw_anchors(self, target: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
        """Draws the conditioning of anchors, [anchors, tokens, width], from the pool's by Eq. 6.

        Args:
            target: Conditioning of the target, [1, tokens, width].
            pool: Conditioning of the captions, [n, tokens, width].
            generator: Source of randomness.
        """
        cosines = torch.cosine_similarity(pool.flatten(1), target.flatten(1))
        weights = (1 - cosines.abs()).clamp(min=1e-6).pow(self.alpha)
        chosen = torch.multinomial(weights, self.anchors, replacement=True, generator=generator)
        return pool[chosen]

    def predict(self, predict: Predict, x: Tensor, t: Tensor, states: Tensor, empty: Tensor) -> Tensor:
        """Predicts noise for conditioning [n, tokens, width] at one x_t: n rows, no guidance branch."""
        n = len(states)
        return predict(x.expand(n, -1, -1, -1), t.expand(n), states)

    def _train(self, backend: Backend, scheduler: Any, target: Target, task: Task) -> Membrane:
        generator = torch.Generator().manual_seed(task.seed)
        adapter = Adapting(backend, target, generator)
        optimizer = torch.optim.AdamW(adapter.parameters, lr=self.learning_rate)
        schedule = get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, self.iterations // 6, self.iterations, num_cycles=3
        )
        empty, surrogate = encode(backend, ["", target.surrogate]).split(1)
        names, pool, ddim = encode(backend, target.names), encode(backend, task.keep), leading(scheduler)
        with adapter.attached():
            for _ in range(self.iterations):
                k = int(torch.randint(len(names), (), generator=generator))
                name = names[k : k + 1]
                x, t = self._noisy(adapter, ddim, name, empty, generator)
                anchors = self.draw_anchors(name, pool, generator)
                with torch.no_grad():
                    eps_sur = self.predict(adapter.closed, x, t, surrogate, empty)
                    eps_tar = self.predict(adapter.closed, x, t, name, empty)
                    eps_anc = self.predict(adapter.closed, x, t, anchors, empty)
                open_tar = self.predict(adapter.opened, x, t, name, empty)
                open_anc = self.predict(adapter.opened, x, t, anchors, empty)
                erasing = (open_tar - eps_sur + self.eta * (eps_tar - eps_sur)).square().mean()
                loss = erasing + self.anchoring * (open_anc - eps_anc).square().mean()
                refuse_not_finite(loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return adapter.membrane()

    def _noisy(
        self, adapter: Adapting, scheduler: Any, name: Tensor, empty: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Denoises the target part of the way, with the membrane open; returns x_t and the timestep to query."""
        taken = int(torch.randint(1, self.steps, (), generator=generator))
        start = torch.randn(1, *adapter.backend.latent_shape, generator=generator)
        noisy = denoise(
            adapter.opened,
            scheduler,
            start,
            name,
            empty,
            steps=self.steps,
            guidance=self.guidance,
            until=taken,
        )
        return noisy.final, self.query(scheduler, taken)


@dataclass(frozen=True, slots=True)
class SpmReleased(SpmPublished):
    """SPM as released (Con6924/SPM): the same training with the code's own behaviour in five places.

    1. `draw_anchors`: anchors are isotropic noise over all token positions, so that Eq. 6 has no effect.
    2. `predict`: every prediction pays for an unconditional row that guidance 1 cancels;
    3. and anchors are interleaved with it before the batch is split in halves: of four anchors the first two are never
       used, and the empty prompt is anchored twice in their place.
    4. `query`: x_t is queried 33-42 of 1,000 steps too noisy.
    5. `composed`: factors of several membranes are added before the product. (Its γ enters both factors, which makes γ²
       of it; at γ = 1 that is 1.)
    """

    name: ClassVar[str] = "spm-as-released"
    several: ClassVar[str] = "trained apart, factors added before the product"

    def composed(self, membranes: Sequence[Membrane]) -> tuple[Membrane, ...]:
        """Returns the one membrane whose factors are the sums: cross terms between all targets."""
        return (summed(membranes),)

    def query(self, scheduler: Any, taken: int) -> Tensor:
        """Returns the entry of the whole grid that the code looks up: as if the grid began at its noisiest end."""
        whole = int(scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(whole)
        return scheduler.timesteps[int(taken * whole / self.steps)]

    def draw_anchors(self, target: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
        """Draws noise of 0.8 to 1.2 times the target's norm, accepted with probability `1 - cos` (about always)."""
        kept: list[Tensor] = []
        while len(kept) < self.anchors:
            noise = torch.randn(target.shape, generator=generator)
            size = 0.8 + 0.4 * torch.rand((), generator=generator)
            anchor = noise / noise.norm() * size * target.norm()
            cosine = torch.cosine_similarity(anchor.flatten(1), target.flatten(1))
            if torch.rand((), generator=generator) < 1 - cosine.squeeze():
                kept.append(anchor)
        return torch.cat(kept)

    def predict(self, predict: Predict, x: Tensor, t: Tensor, states: Tensor, empty: Tensor) -> Tensor:
        """Predicts pairs at guidance 1, `u + 1·(c - u)`; the halves are those of the interleaved batch."""
        n = len(states)
        interleaved = torch.stack([empty.expand(n, -1, -1), states], dim=1).flatten(0, 1)
        u, c = predict(x.expand(2 * n, -1, -1, -1), t.expand(2 * n), interleaved).chunk(2)
        return u + (c - u)
