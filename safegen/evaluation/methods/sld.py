"""SLD, Safe Latent Diffusion (arXiv 2211.05105): guidance away from a text, while drawing.

    ε̄ = ε(∅) + s_g (ε(c) - ε(∅) - γ_t)                                                            (Eq. 3)
    γ_t = μ (ε(c_S) - ε(∅)) + s_m ν_t                                                             (Eq. 4, 7)
    μ = min(1, |s_S (ε(c) - ε(c_S))|) where ε(c) - ε(c_S) < λ, else 0                             (Eq. 5, 6)
    ν_{t+1} = β_m ν_t + (1 - β_m) γ_t                                                             (Eq. 8)

γ_t acts from step δ on; ν gathers before. The paper prints max(1, |φ|) in Eq. 6; the code takes the smaller, as here.
The denoiser answers the pipeline's guided call with ε(c) - γ_t in place of ε(c), which makes Eq. 3 of the pipeline's
own guidance: any scheduler works.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.backend.standin import StandIn
from safegen.errors import UsageError
from safegen.evaluation.methods.base import Drawer, Kind, Task, Unstored, Untrained, listed
from safegen.evaluation.methods.host import encode


@dataclass(frozen=True, slots=True)
class Sld(Untrained):
    """SLD; the defaults are the authors' strongest setting ("Hyp-Max").

    Attributes:
        scale: s_S.
        threshold: λ.
        momentum: s_m.
        beta: β_m.
        warmup: δ as a share of the steps; the authors count steps of 50.
    """

    name: ClassVar[str] = "sld"
    kind: ClassVar[Kind] = "inference"
    several: ClassVar[str] = "all names in one text"

    scale: float = 5000.0
    threshold: float = 1.0
    momentum: float = 0.5
    beta: float = 0.7
    warmup: float = 0.0

    def make(self, pipe: Any, task: Task) -> SafeGuidance:
        """See `Method`."""
        return SafeGuidance(self, encode(backend_of(pipe), [listed(task.names())]))

    def safety(self, eps_empty: Tensor, eps_prompt: Tensor, eps_unsafe: Tensor, momentum: Tensor) -> Tensor:
        """Returns γ_t (Eq. 4 to 7)."""
        difference = eps_prompt - eps_unsafe
        mu = (self.scale * difference).abs().clamp(max=1).where(difference < self.threshold, 0)
        return mu * (eps_unsafe - eps_empty) + self.momentum * momentum


@dataclass(frozen=True, slots=True)
class SafeGuidance(Unstored):
    """SLD for one list of names.

    Attributes:
        method: Its settings.
        unsafe: Conditioning of the names, [1, tokens, width].
    """

    method: Sld
    unsafe: Tensor

    @contextmanager
    def on(self, pipe: Any) -> Generator[Drawer]:
        """See `Eraser`."""
        guided = _Guided(pipe, backend_of(pipe), self)
        guided.attach()
        try:
            yield pipe
        finally:
            guided.detach()


class _Guided(StandIn):
    """Stands in for the denoiser's `forward`."""

    def __init__(self, pipe: Any, backend: Backend, guidance: SafeGuidance) -> None:
        super().__init__(backend.denoiser)
        self._pipe, self._backend, self._guidance = pipe, backend, guidance
        self._step = 0
        self._momentum: Tensor | None = None
        self._last = -1.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts, and takes γ_t off the rows of the prompts."""
        if not self._pipe.do_classifier_free_guidance:
            raise UsageError(
                "sld: drawn without guidance; it acts through classifier-free guidance, use guidance_scale > 1"
            )
        method, call = self._guidance.method, self._backend.call(args, kwargs)
        if self._momentum is None or call.timestep >= self._last:  # timesteps fall during a run
            self._step, self._momentum = 0, None
        self._last = call.timestep
        result = self._base(*args, **kwargs)
        eps_empty, eps_prompt = result[0].chunk(2)
        eps_unsafe = self._unsafe(args, kwargs, len(eps_prompt))
        momentum = torch.zeros_like(eps_prompt) if self._momentum is None else self._momentum
        gamma = method.safety(eps_empty, eps_prompt, eps_unsafe, momentum)
        self._momentum = method.beta * momentum + (1 - method.beta) * gamma
        if self._step >= method.warmup * self._pipe.num_timesteps:
            eps_prompt = eps_prompt - gamma
        self._step += 1
        return (torch.cat([eps_empty, eps_prompt]), *result[1:])

    def _unsafe(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Tensor:
        """Predicts for the names, at the x_t of the prompts' rows."""
        x_t = (args[0] if args else kwargs["sample"])[rows:]
        given = {key: value for key, value in kwargs.items() if key not in ("sample", "encoder_hidden_states")}
        states = self._guidance.unsafe.expand(rows, -1, -1)
        return self._base(x_t, *args[1:2], encoder_hidden_states=states, **given)[0]
