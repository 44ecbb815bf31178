"""The adversary of the robust option: conditioning that brings an erased target back through the open membrane."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def adversarial_states(
    predict: Callable[[Tensor], Tensor], start: Tensor, hint: Tensor, wanted: Tensor, *, tokens: int, steps: int,
    rate: float,
) -> Tensor:  # fmt: skip
    """Learns the last positions of prompts that do not name the target, so that it is drawn all the same.

    The learned positions start as the target's own (those behind its end token, which the denoiser reads too), move
    along the gradient, and keep their norms, so that they stay where conditioning lies.

    Args:
        predict: The open membrane's prediction for conditioning, differentiable.
        start: Conditioning of the surrogate prompts, [rows, tokens, width].
        hint: Conditioning of the target prompts, same shape.
        wanted: What the closed membrane predicts for the target prompts.
        tokens: How many positions are learned; at most all.
        steps: Gradient steps.
        rate: Length of a step, in norms of a position.

    Returns:
        [rows, tokens, width], without gradient: `start` with other last positions.
    """
    kept = start[:, : max(0, start.shape[1] - tokens)]
    learned = hint[:, kept.shape[1] :].clone()
    norms = learned.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        learned.requires_grad_(True)
        with torch.enable_grad():
            loss = (predict(torch.cat([kept, learned], dim=1)) - wanted).pow(2).sum()
            (slope,) = torch.autograd.grad(loss, learned)
        moved = learned.detach() - rate * norms * slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        learned = moved * norms / moved.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.cat([kept, learned], dim=1)
