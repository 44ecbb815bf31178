"""What a training will take, by timing one step of it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from safegen.training.recipe import Trainer


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        drawing: Seconds for one set of trajectories.
        iteration: Seconds for one iteration on them.
        total: Seconds of the whole run.
        peak: Most bytes allocated during both, beyond the model and the membranes.
    """

    drawing: float
    iteration: float
    total: float
    peak: int


def estimate(trainer: Trainer) -> Estimate:
    """Times the steps of a training once, after a step to warm up; the training is not to be run afterwards."""
    config = trainer.config
    with trainer.student.attached():
        draw, iterate = trainer.probe()
        iterate()
        drawing, iteration = seconds(draw), seconds(iterate)
        peak = max(peak_memory(step, trainer.student.device) for step in (draw, iterate))
    sets = -(-config.iterations // config.reuse)
    return Estimate(drawing, iteration, sets * drawing + config.iterations * iteration, peak)


def seconds(action: Callable[[], object]) -> float:
    """Returns how long an action takes, work on other devices included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(action: Callable[[], object], device: torch.device) -> int:
    """Returns the most bytes of tensors that an action held at once, beyond what was held before it.

    On CUDA as the allocator counts them; elsewhere those of every tensor that an operator returns, for as long as its
    storage lives (what a kernel takes for itself meanwhile is not seen).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with _Held() as held:
        action()
    return held.most


class _Held(TorchDispatchMode):
    """Counts the bytes of new storages, and takes them off when they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator."""
        tree_map_only(Tensor, lambda tensor: self._know(tensor, new=False), (args, kwargs))
        found = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda tensor: self._know(tensor, new=True), found)
        return found

    def _know(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = None
        if new:
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
