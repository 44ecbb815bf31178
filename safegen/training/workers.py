"""Several processes that train one membrane together (`accelerate launch`), or the only one.

All of them draw the same rows from the same seed; each computes its own part, and gradients are averaged. So N
processes with `batch` rows each do what one process does with N times as many.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safegen.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among those that train together.

    Attributes:
        rank: Its number, from 0; the first one writes and shows.
        count: How many there are.
        device: Where its model belongs; None: wherever it is.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @classmethod
    def joined(cls) -> Workers:
        """Joins the processes that a launcher started; alone without one.

        Raises:
            TrainingError: There are several, and accelerate is not installed, or did not join them all.
        """
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        if announced == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise TrainingError(
                "several processes train together through accelerate, which is not installed; install safegen[train]"
            ) from error
        state = PartialState(cpu=not torch.accelerator.is_available())
        if state.num_processes != announced:
            raise TrainingError(
                f"the launcher announced {announced} processes, accelerate joined {state.num_processes}: each would "
                "train a membrane of its own; start them with `accelerate launch` on GPUs, with torchrun on CPUs"
            )
        return cls(state.process_index, state.num_processes, state.device)

    def own(self, rows: Tensor) -> Tensor:
        """Returns this process's part of rows that all of them hold; their number is a multiple of `count`."""
        return rows.chunk(self.count)[self.rank]

    def gathered(self, own: Tensor) -> Tensor:
        """Puts the parts of all processes together again, in order."""
        if self.count == 1:
            return own
        from accelerate.utils import gather

        found = gather(own.contiguous())
        assert isinstance(found, Tensor)
        return found

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their means over all processes, in place."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        flat = reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
        assert isinstance(flat, Tensor)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
