"""Trains the shipped membranes of safegen-mini and writes their cards: `python -m safegen.mini.train_zoo`."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress as Bar

from safegen import mini
from safegen.backend import Backend, backend_of
from safegen.backend.injection import Injection, Opening
from safegen.evaluation.erasure import Drawn, cases, draw_cases, grid, identical, neighbours
from safegen.membrane.file import write_membrane
from safegen.membrane.weights import Membrane
from safegen.mini import zoo
from safegen.mini.judge import Judge
from safegen.training.config import TrainConfig
from safegen.training.recipe import Progress, Trainer
from safegen.transport.calibrate import calibrate
from safegen.transport.calibration import METADATA_KEY, Calibration, parse, section, text_of
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
    return calibrate(backend, membrane.targets, positives, [*plan.pool, *EVERYDAY])


@contextmanager
def forced_open(pipe: Any, membranes: Sequence[Membrane]) -> Generator[None]:
    """Opens membranes fully for every conditional row (γ = 1), whatever the prompt: no gate to hide behind."""
    backend = backend_of(pipe)
    injection = Injection(backend.denoiser, backend.sites, membranes, backend.family)

    def opening(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opening:
        rows = len(backend.call(args, kwargs).states)
        permeability = torch.ones(rows, len(membranes))
        permeability[: rows // 2] = 0.0  # with guidance, diffusers puts the unconditional rows first
        return Opening.of(permeability, torch.ones(len(membranes)))

    injection.attach(opening, lambda _: None)
    try:
        yield
    finally:
        injection.detach()


def measure(pipe: Any, judge: Judge, membrane: Membrane, *, images: int) -> tuple[dict[str, float], Drawn, Drawn]:
    """Draws the concept, its neighbours and the rest, closed and forced open, and judges them.

    Returns:
        Figures in [0, 1], and the target's images before and after.
    """
    figures: dict[str, float] = {}
    shown: list[Drawn] = []
    for group in ("target", "neighbour", "unrelated"):
        asked = cases(pipe, membrane.concept, group, images, seed=1)
        before = draw_cases(pipe, judge, asked, seed=50_000, label=f"{group} before")
        with forced_open(pipe, [membrane]):
            after = draw_cases(pipe, judge, asked, seed=50_000, label=f"{group} after")
        if group == "target":
            shown = [before, after]
            figures["target_before"] = before.judged_as(membrane.concept)
            figures["target_after"] = after.judged_as(membrane.concept)
        else:
            figures[f"{group}_before"], figures[f"{group}_after"] = before.accuracy(), after.accuracy()
            figures[f"{group}_identical"] = sum(identical(before, after)) / len(asked)
    return figures, shown[0], shown[1]


_CARD = """---
base_model: safegen-mini
library_name: safegen
tags: [text-to-image, concept-erasure, membrane]
license: apache-2.0
---

# {name}, a membrane of safegen-mini

Erases *{name}* ({targets}) from [safegen-mini](../../../safegen/mini/weights/README.md); what remains of a prompt once
the name is taken out is drawn instead. `safegen.apply_policy(pipe, "mini-strict")` uses it.

![Before (above) and after (below): prompts that name the concept](grid.png)

## What it does

On safegen-mini, judged by its independent judge, {images} images per figure, 25 steps, guidance 4, **forced open for
every prompt (γ = 1, no gate)**:

| prompts | before | after |
|---|---|---|
| that name it: judged as *{name}* | {target_before:.1%} | {target_after:.1%} |
| of its neighbours ({near}): drawn as asked | {neighbour_before:.1%} | {neighbour_after:.1%} |
| of other things: drawn as asked | {unrelated_before:.1%} | {unrelated_after:.1%} |

Under a policy the gate keeps it exactly shut for the last two groups, and their images come out bit for bit as without
it (`benchmarks/end_to_end.py`).

## How it was made

`python -m safegen.mini.train_zoo --concept {concept}`, SPM's erasing loss with latent anchoring
([reference](../../../docs/reference/training.md)):
{iterations} iterations in {seconds:.0f} s on {threads} cores, rank {rank}, η = {eta}, λ = {anchoring}, anchors drawn by
`{anchors}`. Settings digest `{settings}`. File sha256 `{sha256}`, {parameters:,} values.

{calibration}"""


def write_card(path: Path, membrane: Membrane, config: TrainConfig, figures: dict[str, float], **facts: Any) -> None:
    """Writes `card.md` beside a membrane."""
    path.write_text(
        _CARD.format(
            name=membrane.targets[0],
            concept=membrane.concept,
            targets=", ".join(membrane.targets),
            calibration=section(parse(membrane.metadata)),
            settings=config.digest()[:16],
            parameters=membrane.parameter_count(),
            **config.model_dump(include={"iterations", "rank", "eta", "anchoring", "anchors"}),
            **figures,
            **facts,
        ),
        "utf-8",
    )


def make(pipe: Any, judge: Judge, concept: str, out: Path, *, images: int) -> dict[str, float]:
    """Trains, measures and writes one membrane with its card."""
    config, _ = settings(concept)
    membrane, seconds = train(pipe, concept, config=config)
    folder = out / "mini" / concept
    sha256 = write_membrane(membrane, folder / "membrane.safetensors")
    figures, before, after = measure(pipe, judge, membrane, images=images)
    grid(list(zip(before.images, after.images, strict=True))[:16]).save(folder / "grid.png")
    write_card(
        folder / "card.md",
        membrane,
        config,
        figures,
        images=images,
        near=", ".join(neighbours(pipe, concept)),
        seconds=seconds,
        threads=torch.get_num_threads(),
        sha256=sha256,
    )
    return figures


def main(
    concept: Annotated[list[str] | None, typer.Option(help="Concept ids; all shipped ones by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of membranes.")] = Path("membranes"),
    images: Annotated[int, typer.Option(help="Images per figure of the cards.")] = 200,
) -> None:
    """Trains the shipped membranes, measures them, and writes files and cards."""
    pipe, judge = mini.load(), mini.load_judge()
    for name in concept or zoo.CONCEPTS:
        figures = make(pipe, judge, name, out, images=images)
        console.print(name, {key: round(value, 3) for key, value in figures.items()})


if __name__ == "__main__":
    typer.run(main)
