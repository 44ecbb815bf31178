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
    """Anchor probabilities that prefer the target's neighbours: (1-u)·softmax(κ·cos) + u·uniform.

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


def standardised(values: Tensor) -> Tensor:
    """Returns values with mean 0 and deviation 1: cosines of one encoder crowd together, their spread is what tells."""
    return (values - values.mean()) / values.std().clamp(min=1e-6)
