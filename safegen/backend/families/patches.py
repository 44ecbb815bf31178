"""Latents as the tokens of FLUX.1 and Qwen-Image: patches of 2x2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def to_patches(x: Tensor) -> Tensor:
    """Returns latents [n, c, h, w] as tokens [n, h/2 · w/2, 4 c]."""
    n, channels, height, width = x.shape
    found = x.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return found.reshape(n, -1, 4 * channels)


def from_patches(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns tokens as latents of a shape (n, c, h, w)."""
    n, channels, height, width = shape
    found = tokens.view(n, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return found.reshape(n, channels, height, width)
