"""What a training will take, by timing one step of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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
    """Returns the most bytes that an action had allocated at once, beyond what was allocated before it.

    On the CPU it is read off the profiler's record of every allocation.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        action()
    results: Any = profile.profiler
    now = most = 0
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
