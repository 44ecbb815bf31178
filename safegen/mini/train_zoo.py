"""Trains the membranes of safegen-mini, calibrates and measures them, and writes them with their cards.

`python -m safegen.mini.train_zoo --out OUT`, or `make zoo`. A stopped run goes on where it was: membranes that are
there with the same settings are left alone, and the one in training goes on from its checkpoint.
"""

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
from safegen.membrane.file import read_membrane, write_membrane
from safegen.membrane.weights import Membrane
from safegen.mini import zoo
from safegen.mini.judge import Judge
from safegen.mini.measure_zoo import IMAGES, measure, write_measured
from safegen.mini.membrane_card import FIGURES_FILE, Figures, read_figures
from safegen.training.checkpoint import Checkpoints
from safegen.training.config import TrainConfig
from safegen.training.recipe import Progress, Trainer
from safegen.transport.calibrate import calibrate
from safegen.transport.calibration import METADATA_KEY, Calibration, text_of
from safegen.transport.phrasing import EVERYDAY, around

console = Console()


def settings(concept: str, *, seed: int = 0) -> tuple[TrainConfig, tuple[str, ...]]:
    """Returns the settings of a shipped membrane's training, and its anchor pool."""
    plan = zoo.plan(concept)
    config = TrainConfig(
        concept=concept, targets=plan.targets, templates=plan.templates, neighbours=plan.neighbours, seed=seed
    )
    return config, plan.pool


def train(
    pipe: Any, concept: str, *, config: TrainConfig | None = None, checkpoints: Checkpoints | None = None
) -> tuple[Membrane, float]:
    """Trains one membrane and calibrates it.

    Returns:
        The membrane, and the seconds that training took (since its last checkpoint, if it had been stopped).
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

        membrane = trainer.run(report, checkpoints)
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
    checkpoints = Checkpoints(out / "checkpoints" / concept, every=25)
    membrane, seconds = train(pipe, concept, config=config, checkpoints=checkpoints)
    folder = out / "mini" / concept
    write_membrane(membrane, folder / MEMBRANE_FILE)
    figures, pairs = measure(pipe, judge, membrane, images=images, seconds=seconds, threads=torch.get_num_threads())
    write_measured(folder, figures, pairs)
    checkpoints.clear()
    return figures


def is_made(concept: str, out: Path, images: int) -> bool:
    """Tells whether a membrane is in `out` already: trained with these settings, and measured on as many images."""
    folder = out / "mini" / concept
    if not (folder / MEMBRANE_FILE).is_file() or not (folder / FIGURES_FILE).is_file():
        return False
    settled = read_membrane(folder / MEMBRANE_FILE).metadata.get("safegen.training_digest")
    return settled == settings(concept)[0].digest() and read_figures(folder)["images"] == images


def main(
    out: Annotated[Path, typer.Option(help="Folder of membranes to write; `membranes` are the shipped ones.")],
    concept: Annotated[list[str] | None, typer.Option(help="Concept ids; all planned ones by default.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images per figure of the cards.")] = IMAGES,
) -> None:
    """Trains the zoo's membranes, measures them, and writes files and cards; those that are there are left alone."""
    pipe, judge = mini.load(), mini.load_judge()
    for name in concept or zoo.PLANNED:
        if is_made(name, out, images):
            console.print(f"{name}: there already")
            continue
        console.print(name, make(pipe, judge, name, out, images=images))


if __name__ == "__main__":
    typer.run(main)
