"""What moves the factors: the optimizer, its learning rate along the run, and the average that is kept of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safegen.errors import TrainingError
from safegen.training.config import TrainConfig

_LOWEST = 0.02  # of the learning rate, at the end of a cosine


def new_optimizer(config: TrainConfig, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Makes the optimizer.

    Raises:
        TrainingError: `adamw8bit` without bitsandbytes.
    """
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TrainingError(
            "optimizer adamw8bit needs bitsandbytes, which is not installed; `pip install bitsandbytes`, or set "
            "`optimizer: adamw` (a membrane's optimizer state is a few MB either way)"
        ) from error
    return bnb.optim.AdamW8bit(parameters, **options)


def rate_factor(config: TrainConfig, iteration: int) -> float:
    """Returns what the learning rate is multiplied with in an iteration (from 0).

    A linear warm-up, then by `schedule`: half a cosine down to 2 %, `cycles` such cosines one after another (SPM's
    "cosine restart"), or 1 throughout.
    """
    if iteration < config.warmup:
        return (iteration + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = (iteration - config.warmup) / max(1, config.iterations - config.warmup)
    part = (done * config.cycles) % 1 if config.schedule == "restarts" else done
    return _LOWEST + (1 - _LOWEST) * 0.5 * (1 + math.cos(math.pi * part))


class Average:
    """Exponential moving average of tensors, its decay warmed up over the first updates."""

    def __init__(self, decay: float, present: Sequence[Tensor]) -> None:
        """Starts at the present values; a decay of 0 always gives those."""
        self._decay = decay
        self._updates = 0
        self.values = [value.detach().clone() for value in present]

    def update(self, present: Sequence[Tensor]) -> None:
        """Moves one step towards the present values."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for mean, value in zip(self.values, present, strict=True):
            mean.lerp_(value.detach(), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that it holds, for a checkpoint."""
        return {"updates": self._updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self._updates = int(state["updates"])
        for mean, value in zip(self.values, state["values"], strict=True):
            mean.copy_(value)
