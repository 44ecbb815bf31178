"""The loop that every training stage of the recipe runs in: a progress bar, checkpoints, and going on after a stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from safegen.files import write_atomically


class Ema:
    """Exponential moving average of a module's parameters, with the decay warmed up over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self.shadow = {name: p.detach().clone() for name, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average one step towards the module's present parameters."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        averaged: list[Tensor] = []
        present: list[Tensor] = []
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                averaged.append(self.shadow[name])
                present.append(value)
            else:
                self.shadow[name].copy_(value)
        torch._foreach_lerp_(averaged, present, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Returns the average and its update count, for a checkpoint."""
        return {"updates": self._updates, "shadow": self.shadow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self._updates = int(state["updates"])
        self.shadow = {name: value.clone() for name, value in state["shadow"].items()}


def cosine(step: int, steps: int, *, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def trapezoid(step: int, steps: int, *, warmup: int, decay: float = 0.35) -> float:
    """Learning-rate factor: linear warm-up, flat, then linear to 0 over the last `decay` of the steps.

    Unlike a cosine it does not depend on `steps` until the decay begins, so that a build that turns out slower than
    planned can be given fewer steps and goes on from its checkpoint.
    """
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (steps - step) / (decay * steps))


def run_steps(
    name: str,
    steps: int,
    step: Callable[[int], Mapping[str, float]],
    *,
    checkpoint: Path,
    state: Mapping[str, Any],
    every: int = 250,
    lead: bool = True,
) -> None:
    """Runs `step(0) … step(steps - 1)`, saving every `every` steps and going on from the last save.

    Args:
        name: Shown beside the progress bar.
        steps: How many steps the stage has in all.
        step: Does one step and returns figures to show.
        checkpoint: Where the state is kept between saves.
        state: Objects with `state_dict` and `load_state_dict` (modules, optimizer, averages).
        every: Steps between saves.
        lead: False for the further processes of a data-parallel stage: they follow, and neither show nor save.
    """
    start = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        start = int(saved["step"])
        for key, value in state.items():
            value.load_state_dict(saved[key])
        torch.set_rng_state(saved["rng"])

    def save(done: int) -> None:
        content: dict[str, Any] = {key: value.state_dict() for key, value in state.items()}
        content |= {"step": done, "rng": torch.get_rng_state()}
        write_atomically(checkpoint, lambda path: torch.save(content, path))

    if not lead:
        for i in range(start, steps):
            step(i)
        return
    columns = (
        TextColumn(f"{name:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=steps, completed=start, figures="")
        smooth: dict[str, float] = {}
        for i in range(start, steps):
            for key, value in step(i).items():
                smooth[key] = value if key not in smooth else 0.98 * smooth[key] + 0.02 * value
            progress.update(task, advance=1, figures="  ".join(f"{k} {v:.4f}" for k, v in smooth.items()))
            if (i + 1) % every == 0 or i + 1 == steps:
                save(i + 1)
                if not progress.console.is_terminal:
                    figures = "  ".join(f"{k} {v:.4f}" for k, v in smooth.items())
                    progress.console.print(f"{name} {i + 1}/{steps}  {figures}")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def to_model_range(pictures: Tensor) -> Tensor:
    """Turns uint8 pictures [n, 64, 64, 3] into float images [n, 3, 64, 64] in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
