"""What training methods need of a host: encoded prompts, noisy latents along a trajectory, weights that stay put."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from safegen.backend.base import Backend

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, conditioning) to predicted noise."""

_ROWS = 256  # texts encoded at a time


def encode(backend: Backend, texts: Sequence[str]) -> Tensor:
    """Returns the conditioning of texts, [n, tokens, width]."""
    parts = [texts[k : k + _ROWS] for k in range(0, len(texts), _ROWS)]
    return torch.cat([backend.encode(backend.tokenise(part)) for part in parts])


@contextmanager
def frozen(denoiser: nn.Module) -> Generator[None]:
    """Lets no gradient reach the denoiser's own weights."""
    requires = {p: p.requires_grad for p in denoiser.parameters()}
    try:
        for p in requires:
            p.requires_grad_(False)
        yield
    finally:
        for p, value in requires.items():
            p.requires_grad_(value)


def leading(scheduler: Any) -> Any:
    """Returns a DDIM scheduler on the host's noise schedule, each step of which ends exactly at the next timestep."""
    return DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="leading", clip_sample=False, thresholding=False
    )


@dataclass(frozen=True, slots=True)
class Noisy:
    """Noisy latents of several prompts along their own trajectories.

    Attributes:
        x: [steps, n, c, h, w]: x_t before each step.
        t: [steps]: the timestep that each x_t belongs to.
        final: [n, c, h, w]: what the last step ends at, x_0.
    """

    x: Tensor
    t: Tensor
    final: Tensor

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draws `rows` of (x_t, t, index of the prompt) at random."""
        steps, n = self.x.shape[:2]
        k = torch.randint(steps, (rows,), generator=generator)
        i = torch.randint(n, (rows,), generator=generator)
        return self.x[k, i], self.t[k], i


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: Any,
    start: Tensor,
    states: Tensor,
    empty: Tensor,
    *,
    steps: int,
    guidance: float,
    until: int | None = None,
) -> Noisy:
    """Denoises from pure noise with classifier-free guidance.

    Args:
        predict: Predicts the noise.
        scheduler: From `leading`.
        start: Pure noise, [n, c, h, w].
        states: Conditioning, [n, tokens, width].
        empty: Conditioning of the empty prompt, [1, tokens, width].
        steps: Sampler steps of a whole trajectory.
        guidance: s in `eps(∅) + s (eps(c) - eps(∅))`.
        until: How many steps to take; all by default.
    """
    scheduler.set_timesteps(steps)
    n, x = len(states), start
    both = torch.cat([empty.expand(n, -1, -1), states])
    kept: list[Tensor] = []
    for t in scheduler.timesteps[:until]:
        kept.append(x)
        u, c = predict(torch.cat([x, x]), t.expand(2 * n), both).chunk(2)
        x = scheduler.step(u + guidance * (c - u), t, x).prev_sample
    return Noisy(torch.stack(kept), scheduler.timesteps[: len(kept)].clone(), x)


class Supply:
    """Noisy latents of prompts along their own trajectories, drawn anew every `reuse` iterations.

    The published codes denoise for every single iteration; sharing trajectories gives a method the same `E_{x_t, t}`
    for a fraction of the time.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Any,
        states: Tensor,
        generator: torch.Generator,
        *,
        steps: int,
        guidance: float,
        reuse: int,
        trajectories: int = 8,
    ) -> None:
        """Takes the conditioning of all prompts, [n, tokens, width]; `trajectories` of them are denoised at a time."""
        self._shape, self._scheduler = backend.latent_shape, leading(scheduler)
        self._states, self._empty = states, encode(backend, [""])
        self._generator = generator
        self._steps, self._guidance, self._reuse, self._trajectories = steps, guidance, reuse, trajectories
        self._used = 0
        self._noisy: tuple[Noisy, Tensor] | None = None

    def draw(self, predict: Predict, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws (x_t, t, index of the prompt) for one iteration; `predict` is what denoises when that is due."""
        if self._noisy is None or self._used == self._reuse:
            which = torch.randint(len(self._states), (self._trajectories,), generator=self._generator)
            start = torch.randn(self._trajectories, *self._shape, generator=self._generator)
            noisy = denoise(
                predict,
                self._scheduler,
                start,
                self._states[which],
                self._empty,
                steps=self._steps,
                guidance=self._guidance,
            )
            self._noisy, self._used = (noisy, which), 0
        self._used += 1
        noisy, which = self._noisy
        x, t, index = noisy.draw(rows, self._generator)
        return x, t, which[index]
