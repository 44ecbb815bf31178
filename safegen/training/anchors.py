"""Where anchors are drawn from: the concepts that latent anchoring holds in place (SPM §3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def paper_weights(cosines: Tensor, alpha: float) -> Tensor:
    """Anchor probabilities of SPM Eq. 6: P(c) ∝ (1 - |cos(c, c_tar)|)^α.

    Args:
        cosines: Cosine of each candidate with the target, [candidates], in [-1, 1].
        alpha: α ≥ 0; 0 is uniform, more prefers concepts unlike the target.

    Returns:
        [candidates], non-negative, summing to 1; uniform where all weights are zero.
    """
    weights = (1 - cosines.abs()).clamp(min=0).pow(alpha)
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))


def neighbour_weights(cosines: Tensor, sharpness: float, uniform: float) -> Tensor:
    """Anchor probabilities that prefer the target's neighbours: (1-u)·softmax(κ·z(cos)) + u·uniform.

    Unlike Eq. 6, which keeps away from the target, this spends most anchors on the concepts that an eraser damages
    first (docs/decisions/0005); the uniform share keeps the rest in place.

    Args:
        cosines: Cosine of each candidate with the target, [candidates], in [-1, 1].
        sharpness: κ ≥ 0.
        uniform: u in [0, 1].

    Returns:
        [candidates], positive, summing to 1.
    """
    near = (sharpness * standardised(cosines)).softmax(dim=0)
    return (1 - uniform) * near + uniform / len(cosines)


def with_named(weights: Tensor, count: int, share: float) -> Tensor:
    """Makes room for candidates that a person named: they follow the others, and share `share` evenly.

    Args:
        weights: Probabilities of the other candidates, [candidates], summing to 1.
        count: How many were named.
        share: In [0, 1]; read where any was named.

    Returns:
        [candidates + count], summing to 1.
    """
    if count == 0:
        return weights
    return torch.cat([(1 - share) * weights, torch.full((count,), share / count)])


def reference_anchors(target: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Anchors as SPM's released code draws them (src/engine/sampling.py): white noise, not prompts.

    Noise over all positions, of 0.8–1.2 times the target's norm, is accepted with probability 1 - cos(noise, target).
    In so many dimensions that cosine is 0 within a hundredth, so that Eq. 6 has no effect there.

    Args:
        target: Conditioning of the target, [tokens, width].
        count: How many to draw.
        generator: Source of chance.

    Returns:
        [count, tokens, width].
    """
    kept: list[Tensor] = []
    wanted = target.flatten().cpu()
    while len(kept) < count:
        noise = torch.randn(wanted.shape, generator=generator)
        size, chance = torch.rand(2, generator=generator).tolist()
        noise *= (0.8 + 0.4 * size) * wanted.norm() / noise.norm()
        if chance < 1 - torch.cosine_similarity(noise, wanted, dim=0):
            kept.append(noise.view(target.shape))
    return torch.stack(kept).to(target) if kept else target.new_zeros(0, *target.shape)


def standardised(values: Tensor) -> Tensor:
    """Returns values with mean 0 and deviation 1: cosines of one encoder crowd together, their spread is what tells."""
    return (values - values.mean()) / values.std().clamp(min=1e-6)
