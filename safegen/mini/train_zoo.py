"""Trains the membranes of safegen-mini and writes their cards: `python -m safegen.mini.train_zoo --out OUT`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress as Bar

from safegen import mini
from safegen.backend import Backend, backend_of
from safegen.bundle.store import MEMBRANE_FILE
from safegen.membrane.file import write_membrane
from safegen.membrane.weights import Membrane
from safegen.mini import zoo
from safegen.mini.judge import Judge
from safegen.mini.measure_zoo import IMAGES, measure, write_measured
from safegen.mini.membrane_card import Figures
from safegen.training.config import TrainConfig
from safegen.training.recipe import Progress, Trainer
from safegen.transport.calibrate import calibrate
from safegen.transport.calibration import METADATA_KEY, Calibration, text_of
from safegen.transport.phrasing import EVERYDAY, around

console = Console()


def settings(concept: str, *, seed: int = 0) -> tuple[TrainConfig, tuple[str, ...]]:
    """Returns the settings of a shipped membrane's training, and its anchor pool."""
    plan = zoo.plan(concept)
    config = TrainConfig(concept=concept, targets=plan.targets, templates=plan.templates, seed=seed)
    return config, plan.pool


def train(pipe: Any, concept: str, *, config: TrainConfig | None = None) -> tuple[Membrane, float]:
    """Trains one membrane and calibrates it.

    Returns:
        The membrane and the seconds that training took.
    """
    chosen, pool = settings(concept)
    backend = backend_of(pipe)
    started = time.perf_counter()
    trainer = Trainer(backend, config or chosen, pool, pipe.scheduler)
    with Bar(console=console, transient=True) as bar:
        task = bar.add_task(concept, total=(config or chosen).iterations)

        def report(progress: Progress) -> None:
            text = f"{concept} erasing {progress.erasing:.4f} anchoring {progress.anchoring:.6f}"
            bar.update(task, completed=progress.iteration, description=text)

        membrane = trainer.run(report)
    seconds = time.perf_counter() - started
    found = text_of(calibration(backend, membrane))
    return replace(membrane, metadata={**membrane.metadata, METADATA_KEY: found}), seconds


def calibration(backend: Backend, membrane: Membrane) -> tuple[Calibration, ...]:
    """Measures a membrane's thresholds on the captions that it was trained with, and on everyday ones."""
    plan = zoo.plan(membrane.concept)
    positives = around(membrane.targets, [prompt for prompt, _ in plan.templates])
    return calibrate(
        backend, membrane.targets, positives, [*plan.pool, *EVERYDAY], neighbours=zoo.near(membrane.concept)
    )


def make(
    pipe: Any, judge: Judge, concept: str, out: Path, *, images: int, config: TrainConfig | None = None
) -> Figures:
    """Trains, measures and writes one membrane with its card."""
    membrane, seconds = train(pipe, concept, config=config)
    folder = out / "mini" / concept
    write_membrane(membrane, folder / MEMBRANE_FILE)
    figures, pairs = measure(pipe, judge, membrane, images=images, seconds=seconds, threads=torch.get_num_threads())
    write_measured(folder, figures, pairs)
    return figures


def main(
    out: Annotated[Path, typer.Option(help="Folder of membranes to write; `membranes` are the shipped ones.")],
    concept: Annotated[list[str] | None, typer.Option(help="Concept ids; all shipped ones by default.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images per figure of the cards.")] = IMAGES,
) -> None:
    """Trains the shipped membranes, measures them, and writes files and cards."""
    pipe, judge = mini.load(), mini.load_judge()
    for name in concept or zoo.CONCEPTS:
        console.print(name, make(pipe, judge, name, out, images=images))


if __name__ == "__main__":
    typer.run(main)
