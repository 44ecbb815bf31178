"""One training, from settings to a membrane (SPM, arXiv 2312.16145, Eq. 3–8; house.md §6).

    trajectories of targets and anchors, membrane closed, no gradient   → x_t at its own timestep
    closed, no gradient, one batch: eps of surrogate, target, anchors
    open, with gradient, one batch: eps of target, anchors
    erasing loss + λ · anchoring loss → clip → step

No prediction pays for a guidance branch (guidance 1 needs none); trajectories are shared by several iterations; x_t is
always queried at the timestep it belongs to (the reference code queries it 33–42 steps too noisy).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from safegen.backend.base import Backend
from safegen.backend.injection import Injection, Opening
from safegen.backend.sites import file_key
from safegen.errors import TrainingError
from safegen.membrane.weights import Factor, Membrane
from safegen.training.anchors import neighbour_weights, paper_weights
from safegen.training.config import TrainConfig
from safegen.training.losses import anchoring_loss, erasing_loss

_UNIFORM_SHARE = 0.3
_MAX_GRAD_NORM = 1.0
_TRAJECTORIES = 8  # target trajectories drawn at a time, and as many of anchors


@dataclass(frozen=True, slots=True)
class Progress:
    """One iteration's figures: its number (from 1), the erasing loss, and the anchoring loss before λ."""

    iteration: int
    erasing: float
    anchoring: float


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


class Trainer:
    """Trains one membrane on one host."""

    def __init__(self, backend: Backend, config: TrainConfig, pool: Sequence[str], scheduler: Any) -> None:
        """Prepares a training.

        Args:
            backend: The host; its weights are not changed.
            config: Settings.
            pool: Captions that anchors are drawn from; those that name a target should be left out.
            scheduler: The host's scheduler; its noise schedule is used.

        Raises:
            TrainingError: The pool is empty.
        """
        if not pool:
            raise TrainingError("the anchor pool is empty; expected captions of what the membrane must leave alone")
        self.backend, self.config = backend, config
        # Leading steps, so that each DDIM step ends exactly at the next timestep; latents are never clipped.
        self._scheduler: Any = DDIMScheduler.from_config(
            scheduler.config, timestep_spacing="leading", clip_sample=False, thresholding=False
        )
        self._generator = torch.Generator().manual_seed(config.seed)
        self._rng = np.random.default_rng(config.seed)
        self._factors = self._new_factors()
        self._membrane = Membrane(
            config.concept, config.targets, backend.family, backend.sites.architecture, self._factors, config.surrogate
        )
        self._injection = Injection(backend.denoiser, backend.sites, [self._membrane], backend.family)
        self._opening = Opening(0, (), torch.zeros(0, 0), None)
        parameters = [p for f in self._factors.values() for p in (f.down, f.up)]
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        self._empty = self._encode([""])
        self._pool = self._encode(pool)
        self._weights = self._anchor_weights()

    def _new_factors(self) -> dict[str, Factor]:
        """Up factors are 0, so that training starts at the base model; down factors are Kaiming uniform, a = √5."""
        factors: dict[str, Factor] = {}
        for name, module in self.backend.sites.modules.items():
            weight = module.weight
            down = torch.empty(self.config.rank, *weight.shape[1:])
            bound = 1 / math.sqrt(down[0].numel())  # kaiming_uniform_ with a = √5
            down.uniform_(-bound, bound, generator=self._generator)
            up = torch.zeros(weight.shape[0], self.config.rank, *([1, 1] if weight.ndim == 4 else []))
            factors[file_key(name)] = Factor(down.requires_grad_(True), up.requires_grad_(True), self.config.alpha)
        return factors

    def _encode(self, texts: Sequence[str]) -> Tensor:
        parts = [self.backend.encode(self.backend.tokenise(texts[k : k + 256])) for k in range(0, len(texts), 256)]
        return torch.cat(parts)

    def _anchor_weights(self) -> Tensor:
        target = self._encode([self.config.targets[0]])
        pool, wanted = self._pool.mean(dim=1), target.mean(dim=1)
        center = self._empty.mean(dim=1)
        cosines = torch.nn.functional.cosine_similarity(pool - center, wanted - center)
        if self.config.anchors == "paper":
            return paper_weights(cosines, self.config.anchor_alpha)
        return neighbour_weights(cosines, self.config.sharpness, _UNIFORM_SHARE)

    def _eps(self, x: Tensor, t: Tensor, states: Tensor, *, opened: bool) -> Tensor:
        """Predicts noise; with the membrane fully open or shut."""
        membranes = (0,) if opened else ()
        self._opening = Opening(len(x), membranes, torch.ones(len(x), len(membranes)), None)
        return self.backend.predict(x, t, states)

    @torch.no_grad()
    def _trajectories(self, states: Tensor) -> Rows:
        """Denoises from pure noise with the membrane closed and keeps every x_t with its own timestep."""
        self._scheduler.set_timesteps(self.config.trajectory_steps)
        n, guidance = len(states), self.config.trajectory_guidance
        x = torch.randn(n, *self.backend.latent_shape, generator=self._generator)
        kept: list[Tensor] = []
        both = torch.cat([self._empty.expand(n, -1, -1), states])
        for t in self._scheduler.timesteps:
            kept.append(x)
            if guidance == 1:
                eps = self._eps(x, t.expand(n), states, opened=False)
            else:
                u, c = self._eps(torch.cat([x, x]), t.expand(2 * n), both, opened=False).chunk(2)
                eps = u + guidance * (c - u)
            x = self._scheduler.step(eps, t, x).prev_sample
        return Rows(states, torch.stack(kept), self._scheduler.timesteps.clone())

    def _target_prompts(self) -> tuple[Tensor, Tensor]:
        """Draws prompts that name the target, and for each what remains once it is erased."""
        targets: list[str] = []
        surrogates: list[str] = []
        for _ in range(_TRAJECTORIES):
            name = self.config.targets[int(self._rng.integers(len(self.config.targets)))]
            template, rest = self.config.templates[int(self._rng.integers(len(self.config.templates)))]
            targets.append(template.format(name))
            surrogates.append(template.format(self.config.surrogate) if self.config.surrogate else rest)
        return self._encode(targets), self._encode(surrogates)

    def _refresh(self) -> tuple[Rows, Tensor, Rows]:
        targets, surrogates = self._target_prompts()
        chosen = torch.multinomial(self._weights, _TRAJECTORIES, replacement=True, generator=self._generator)
        rows = self._trajectories(torch.cat([targets, self._pool[chosen]]))
        k = len(targets)
        return (
            Rows(rows.states[:k], rows.x[:, :k], rows.t),
            surrogates,
            Rows(rows.states[k:], rows.x[:, k:], rows.t),
        )

    def _anchor_rows(self, own: Rows, targets: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Draws anchors: half at their own x_t, the rest at the target's (as Eq. 7 has it), one the empty prompt."""
        size = self.config.anchor_batch
        x, t, states, _ = own.draw(size // 2, self._generator)
        x2, t2, _, _ = targets.draw(size - size // 2, self._generator)
        chosen = torch.multinomial(self._weights, len(x2), replacement=True, generator=self._generator)
        states2 = torch.cat([self._empty, self._pool[chosen[1:]]])
        return torch.cat([x, x2]), torch.cat([t, t2]), torch.cat([states, states2])

    def _iteration(self, targets: Rows, surrogates: Tensor, own: Rows) -> tuple[float, float]:
        n = self.config.batch
        x, t, states, index = targets.draw(n, self._generator)
        ax, at, astates = self._anchor_rows(own, targets)
        with torch.no_grad():
            closed = self._eps(
                torch.cat([x, x, ax]),
                torch.cat([t, t, at]),
                torch.cat([surrogates[index], states, astates]),
                opened=False,
            )
        opened = self._eps(torch.cat([x, ax]), torch.cat([t, at]), torch.cat([states, astates]), opened=True)
        erasing = erasing_loss(opened[:n], closed[:n], closed[n : 2 * n], self.config.eta)
        anchoring = anchoring_loss(opened[n:], closed[2 * n :])
        loss = erasing + self.config.anchoring * anchoring
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()}; lower learning_rate (now {self.config.learning_rate:g})")
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, _MAX_GRAD_NORM)
        self._optimizer.step()
        return erasing.item(), anchoring.item()

    def run(self, report: Callable[[Progress], None] = lambda _: None) -> Membrane:
        """Trains, and returns the membrane.

        Args:
            report: Called after every iteration.

        Raises:
            TrainingError: The loss is not finite, or the membrane changes nothing.
        """
        self._injection.attach(lambda _args, _kwargs: self._opening, lambda _: None)
        requires = {p: p.requires_grad for p in self.backend.denoiser.parameters()}
        try:
            for p in requires:
                p.requires_grad_(False)
            rows: tuple[Rows, Tensor, Rows] | None = None
            for i in range(self.config.iterations):
                for group in self._optimizer.param_groups:
                    progress = i / self.config.iterations
                    group["lr"] = self.config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
                if rows is None or i % self.config.reuse == 0:
                    rows = self._refresh()
                erasing, anchoring = self._iteration(*rows)
                report(Progress(i + 1, erasing, anchoring))
        finally:
            for p, value in requires.items():
                p.requires_grad_(value)
            self._injection.detach()
        return self._finished()

    def _finished(self) -> Membrane:
        if all(f.up.detach().abs().max() < 1e-8 for f in self._factors.values()):
            raise TrainingError("the trained membrane changes nothing: every up factor is still 0")
        factors = {
            key: Factor(f.down.detach().clone(), f.up.detach().clone(), f.alpha) for key, f in self._factors.items()
        }
        return Membrane(
            self.config.concept,
            self.config.targets,
            self.backend.family,
            self.backend.sites.architecture,
            factors,
            self.config.surrogate,
            metadata={
                "safegen.training": self.config.model_dump_json(),
                "safegen.training_digest": self.config.digest(),
            },
        )
