"""Measures membranes of safegen-mini without training them: `python -m safegen.mini.measure_zoo`.

Membranes are forced open for every prompt, so that no gate hides what they do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from safegen import mini
from safegen.bundle.store import MEMBRANE_FILE
from safegen.evaluation.erasure import Drawn, cases, draw_cases, neighbours
from safegen.evaluation.methods.adapters import Adapters
from safegen.evaluation.sheet import Pair, pairs_sheet
from safegen.membrane.file import read_membrane
from safegen.membrane.weights import Membrane
from safegen.mini import zoo
from safegen.mini.judge import Judge
from safegen.mini.membrane_card import Figures, read_figures, write_card
from safegen.resources import shipped

IMAGES = 200
_SHOWN = 16  # pairs of a grid


def _both(pipe: Any, judge: Judge, membrane: Membrane, group: Any, images: int) -> tuple[Drawn, Drawn]:
    asked = cases(pipe, membrane.concept, group, images, seed=1)
    before = draw_cases(pipe, judge, asked, seed=50_000, label=f"{membrane.concept}: {group} before")
    with Adapters((membrane,), both=False).on(pipe):
        after = draw_cases(pipe, judge, asked, seed=50_000, label=f"{membrane.concept}: {group} after")
    return before, after


def measure(
    pipe: Any, judge: Judge, membrane: Membrane, *, images: int, seconds: float, threads: int
) -> tuple[Figures, tuple[Pair, ...]]:
    """Draws the concept, its neighbours and the rest, closed and forced open, and judges them.

    Args:
        pipe: safegen-mini.
        judge: The independent judge.
        membrane: What to measure.
        images: Images per figure.
        seconds: What its training took, for the figures.
        threads: Cores of its training.

    Returns:
        The figures, and some pairs of the target to look at.
    """
    target = _both(pipe, judge, membrane, "target", images)
    near = _both(pipe, judge, membrane, "neighbour", images)
    rest = _both(pipe, judge, membrane, "unrelated", images)
    figures: Figures = {
        "images": images,
        "target": (target[0].judged_as(membrane.concept), target[1].judged_as(membrane.concept)),
        "neighbour": (near[0].accuracy(), near[1].accuracy()),
        "unrelated": (rest[0].accuracy(), rest[1].accuracy()),
        "neighbours": neighbours(pipe, membrane.concept),
        "seconds": seconds,
        "threads": threads,
    }
    prompts = [case.prompt for case in target[0].cases]
    pairs = zip(prompts, target[0].images, target[1].images, strict=True)
    return figures, tuple(Pair(*pair) for pair in pairs)[:_SHOWN]


def write_measured(folder: Path, figures: Figures, pairs: Sequence[Pair]) -> None:
    """Writes figures, card and grid beside the membrane in `folder`."""
    write_card(folder, figures)
    pairs_sheet(pairs).save(folder / "grid.png")


def main(
    concept: Annotated[list[str] | None, typer.Option(help="Concept ids; all shipped ones by default.")] = None,
    membranes: Annotated[
        Path | None, typer.Option(help="Folder of membranes that train_zoo wrote.", show_default="the shipped ones")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images per figure.")] = IMAGES,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Rewrite figures.json, card.md and grid.png.")] = False,
) -> None:
    """Measures membranes of safegen-mini, closed and forced open, and prints the figures."""
    pipe, judge, console = mini.load(), mini.load_judge(), Console(stderr=as_json)
    found: dict[str, Figures] = {}
    for name in concept or zoo.CONCEPTS:
        folder = (membranes or shipped("membranes")) / "mini" / name
        old = read_figures(folder)
        membrane = read_membrane(folder / MEMBRANE_FILE)
        found[name], pairs = measure(
            pipe, judge, membrane, images=images, seconds=old["seconds"], threads=old["threads"]
        )
        if write:
            write_measured(folder, found[name], pairs)
        for group in ("target", "neighbour", "unrelated"):
            before, after = found[name][group]
            console.print(f"{name:<12} {group:<9} {before:.1%} -> {after:.1%}")
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
