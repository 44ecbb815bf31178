"""What making an eraser costs: seconds and peak memory, measured while it is made."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil

from safegen.evaluation.methods.base import Eraser, Method, Task

_INTERVAL = 0.005  # seconds between two looks at the memory


@dataclass(frozen=True, slots=True)
class Cost:
    """What an eraser cost.

    Attributes:
        seconds: Wall-clock time.
        cpu_seconds: Time of all this process's threads, which other processes do not stretch.
        peak_mb: Most memory of the process above that from before, in MB (10⁶ bytes), looked at every 5 ms.
        stored: Bytes that have to be kept to erase again.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float
    stored: int


class _Watch(threading.Thread):
    """Remembers the most resident memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._done = threading.Event()
        self.start_bytes = self.most = self._resident()

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def run(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.most = max(self.most, self._resident())

    def stop(self) -> int:
        """Ends the thread; returns the most bytes above those at the start."""
        self._done.set()
        self.join()
        return self.most - self.start_bytes


def _give_back() -> None:
    """Returns freed memory to the system, where the C library can: what it keeps would hide what comes next."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def make(method: Method, pipe: Any, task: Task) -> tuple[Eraser, Cost]:
    """Makes an eraser and measures what that costs.

    Raises:
        SafegenError: The method cannot act on this pipeline, or its training failed.
    """
    _give_back()
    watch = _Watch()
    watch.start()
    started, cpu = time.perf_counter(), time.process_time()
    try:
        eraser = method.make(pipe, task)
    finally:
        seconds, cpu_seconds, peak = time.perf_counter() - started, time.process_time() - cpu, watch.stop()
    return eraser, Cost(seconds, cpu_seconds, peak / 1e6, eraser.stored)
