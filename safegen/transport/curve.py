"""From a score to a permeability: exactly 0 below one threshold, 1 above the other, linear between."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safegen.errors import UsageError


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve with two thresholds.

    With `lo` 0 and `hi` 1 it is the identity on [0, 1], as in SPM Eq. 11; with `lo` equal to `hi` it is a step.

    Attributes:
        lo: Below it the membrane is exactly shut.
        hi: From it on the membrane is fully open; at least `lo`.
    """

    lo: float
    hi: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lo) and math.isfinite(self.hi) and self.lo <= self.hi):
            raise UsageError(
                f"thresholds lo {self.lo} and hi {self.hi}: expected two numbers, lo not above hi; correct them"
            )


def permeabilities(scores: Tensor, curves: list[Curve | None]) -> Tensor:
    """Returns γ of scores.

    Args:
        scores: [rows, targets].
        curves: The curve of each target; None where this score opens nothing.

    Returns:
        [rows, targets], in [0, 1]; exactly 0 below `lo`, exactly 1 from `hi` on.
    """
    shut = math.inf
    lo = torch.tensor([c.lo if c else shut for c in curves], dtype=torch.float64)
    hi = torch.tensor([c.hi if c else shut for c in curves], dtype=torch.float64)
    slope = (scores - lo) / (hi - lo)  # not a number for a step, which has nothing between its thresholds
    between = torch.where((scores >= lo) & (hi > lo), slope, 0.0)
    return torch.where(scores >= hi, 1.0, between).float()
