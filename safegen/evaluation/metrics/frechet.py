"""Fréchet distance between two sets of features: how far a method moves images that it should leave alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def frechet_distance(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    """Returns the squared Fréchet (2-Wasserstein) distance of two Gaussians fitted to features.

        ‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½)                                    (Dowson and Landau 1982)

    With centred features A, B, [n, d] over √(n-1), Σ = AᵀA, and the eigenvalues of Σ_a Σ_b other than 0 are the squared
    singular values of A Bᵀ: tr (Σ_a Σ_b)^½ is their sum. That is exact for fewer images than features too, where the
    square root of a matrix is ill-conditioned. The distance of few images is biased upwards: compare it at equal n.

    With the judge's features this is not FID, whose features are Inception's.

    Args:
        before: Features, [n, d], n ≥ 2.
        after: Features, [m, d], m ≥ 2.
    """
    means = before.mean(axis=0), after.mean(axis=0)
    a = (before - means[0]) / np.sqrt(len(before) - 1)
    b = (after - means[1]) / np.sqrt(len(after) - 1)
    spread = np.square(a).sum() + np.square(b).sum() - 2 * np.linalg.norm(a @ b.T, ord="nuc")
    return float(np.square(means[0] - means[1]).sum() + max(0.0, float(spread)))
