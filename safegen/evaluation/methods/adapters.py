"""Adapters: membranes (a LoRA is one of higher rank) in training, and fully open while drawing."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.backend.injection import Injection, Opening
from safegen.backend.sites import file_key
from safegen.evaluation.methods.base import Drawer, Target, nbytes
from safegen.evaluation.methods.host import frozen
from safegen.membrane.weights import Factor, Membrane


@dataclass(frozen=True, slots=True)
class Adapters:
    """Membranes that are open for every prompt (γ = 1): no gate to hide behind.

    Attributes:
        membranes: What is open; their outputs add up.
        both: Whether they act on the unconditional rows of guidance too, as the released SPM and every LoRA do.
    """

    membranes: tuple[Membrane, ...]
    both: bool

    @property
    def stored(self) -> int:
        """See `Eraser`: the factors."""
        return nbytes(t for m in self.membranes for f in m.factors.values() for t in (f.down, f.up))

    @contextmanager
    def on(self, pipe: Any) -> Generator[Drawer]:
        """See `Eraser`."""
        backend = backend_of(pipe)
        injection = Injection(backend.denoiser, backend.sites, self.membranes, backend.family)

        def opening(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opening:
            rows = len(backend.call(args, kwargs).states)
            gamma = torch.ones(rows, len(self.membranes))
            if not self.both and pipe.do_classifier_free_guidance:
                gamma[: rows // 2] = 0.0  # diffusers puts the unconditional rows first
            return Opening.of(gamma, torch.ones(len(self.membranes)))

        injection.attach(opening, lambda _: None)
        try:
            yield pipe
        finally:
            injection.detach()


class Adapting:
    """One adapter while it is trained; use `attached` around all predictions."""

    def __init__(
        self, backend: Backend, target: Target, generator: torch.Generator, *, rank: int = 1, alpha: float = 1.0
    ) -> None:
        """Starts at the base model: up factors are 0, down factors Kaiming uniform with a = √5 (SPM C.1)."""
        self.backend = backend
        factors: dict[str, Factor] = {}
        for name, module in backend.sites.modules.items():
            weight = module.weight
            down = torch.empty(rank, *weight.shape[1:])
            bound = 1 / math.sqrt(down[0].numel())
            down.uniform_(-bound, bound, generator=generator)
            up = torch.zeros(weight.shape[0], rank, *([1, 1] if weight.ndim == 4 else []))
            factors[file_key(name)] = Factor(down.requires_grad_(True), up.requires_grad_(True), alpha)
        self._target, self._factors = target, factors
        self.parameters: list[Tensor] = [p for f in factors.values() for p in (f.down, f.up)]
        self._opening = Opening.of(torch.zeros(0, 1), torch.ones(1))

    def membrane(self) -> Membrane:
        """Returns the adapter as it is now; the tensors are shared."""
        backend, target = self.backend, self._target
        factors = {key: Factor(f.down.detach(), f.up.detach(), f.alpha) for key, f in self._factors.items()}
        return Membrane(
            target.concept, target.names, backend.family, backend.sites.architecture, factors, target.surrogate
        )

    @contextmanager
    def attached(self) -> Generator[None]:
        """Attaches the adapter, and lets gradients reach it alone."""
        backend, finished = self.backend, self.membrane()
        live = Membrane(
            finished.concept, finished.targets, finished.base, finished.architecture, self._factors, finished.surrogate
        )
        injection = Injection(backend.denoiser, backend.sites, [live], backend.family)
        injection.attach(lambda _args, _kwargs: self._opening, lambda _: None)
        try:
            with frozen(backend.denoiser):
                yield
        finally:
            injection.detach()

    def opened(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Predicts noise with the adapter fully open on every row."""
        return self._predict(x_t, t, states, 1.0)

    @torch.no_grad()
    def closed(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Predicts noise without the adapter."""
        return self._predict(x_t, t, states, 0.0)

    def _predict(self, x_t: Tensor, t: Tensor, states: Tensor, gamma: float) -> Tensor:
        self._opening = Opening.of(torch.full((len(x_t), 1), gamma), torch.ones(1))
        return self.backend.predict(x_t, t, states)


def summed(membranes: Sequence[Membrane]) -> Membrane:
    """Sums factors before the product, as SPM's released code composes: `(Σ up)(Σ down) = Σ_i Σ_j up_i down_j`.

    One membrane stays as it is; of several, every pair adds a cross term, and the rank does not grow.
    """
    first = membranes[0]
    factors = {
        key: Factor(
            torch.stack([m.factors[key].down for m in membranes]).sum(dim=0),
            torch.stack([m.factors[key].up for m in membranes]).sum(dim=0),
            factor.alpha,
        )
        for key, factor in first.factors.items()
    }
    names = tuple(name for m in membranes for name in m.targets)
    return Membrane("+".join(m.concept for m in membranes), names, first.base, first.architecture, factors)
