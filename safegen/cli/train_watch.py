"""Watching a training: progress, TensorBoard, pictures before and after."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegen.cli.drawing import Drawing, draw, picture, save_picture
from safegen.cli.options import MINI
from safegen.cli.render import progress
from safegen.errors import UsageError

if TYPE_CHECKING:
    from safegen.cli.train_run import Run
    from safegen.training.config import TrainConfig
    from safegen.training.recipe import Progress, Trainer

_PAIRS = 4  # prompts of the target in a grid, and as many captions that must stay
_STEPS = 25
_MINI_GUIDANCE = 4.0


@dataclass(frozen=True, slots=True)
class Watching:
    """What a user asked to see.

    Attributes:
        folder: Folder that membranes are written to, of this base family.
        grid_every: Iterations between two grids; 0: none.
        tensorboard: Folder of TensorBoard's event files; None: none.
    """

    folder: Path
    grid_every: int = 0
    tensorboard: Path | None = None


@contextmanager
def watching(pipe: Any, trainer: Trainer, run: Run, asked: Watching) -> Generator[Callable[[Progress], None]]:
    """Yields what a training reports to."""
    writer = _writer(asked.tensorboard) if asked.tensorboard else None
    grids = [_Grid(pipe, trainer, run, k, asked.folder) for k in range(len(run.configs) if asked.grid_every else 0)]
    with progress("training", run.configs[0].iterations, lines=True) as step:

        def report(now: Progress) -> None:
            step(now.iteration, f"erasing {now.erasing:.3g}  anchoring {now.anchoring:.3g}")
            if writer is not None:
                for name in ("erasing", "anchoring", "rate", "norm"):
                    writer.add_scalar(name, getattr(now, name), now.iteration)
            if asked.grid_every and now.iteration % asked.grid_every == 0:
                for grid in grids:
                    grid.write(now.iteration)

        try:
            yield report
        finally:
            if writer is not None:
                writer.close()


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard: tensorboard is not installed; install safegen[train]") from error
    return SummaryWriter(folder)


class _Grid:
    """Pictures of a concept's prompts and of captions, with its membrane shut and fully open, from the same noise."""

    def __init__(self, pipe: Any, trainer: Trainer, run: Run, concept: int, folder: Path) -> None:
        config = run.configs[concept]
        self._pipe, self._trainer, self._concept = pipe, trainer, concept
        self._prompts = [*_wordings(config), *run.pool[:: max(1, len(run.pool) // _PAIRS)][:_PAIRS]]
        self._how = Drawing(0, _STEPS, _MINI_GUIDANCE if run.model == MINI else None)
        self._folder = folder / config.concept / "grids"
        self._before: list[Any] = []

    def _draw(self, concept: int | None) -> list[Any]:
        with self._trainer.student.drawing(concept):
            return [picture(image) for images in draw(self._pipe, self._prompts, self._how) for image in images]

    def write(self, iteration: int) -> None:
        from safegen.evaluation.sheet import Pair, pairs_sheet

        self._before = self._before or self._draw(None)
        triples = zip(self._prompts, self._before, self._draw(self._concept), strict=True)
        sheet = pairs_sheet([Pair(*triple) for triple in triples])
        save_picture(sheet, self._folder / f"step-{iteration:08d}.png")


def _wordings(config: TrainConfig) -> list[str]:
    chosen = config.templates[:: max(1, len(config.templates) // _PAIRS)][:_PAIRS]
    return [template.format(config.targets[0]) for template, _ in chosen]
