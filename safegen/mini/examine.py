"""Examines safegen-mini: what the independent judge sees in images drawn with fresh seeds.

`python -m safegen.mini.examine` examines the weights that are installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from safegen import mini
from safegen.mini import captions
from safegen.mini.card import write_card
from safegen.mini.catalogue import OBJECTS, STYLES, is_held_out, with_article
from safegen.mini.judge import Judge

STEPS = 25
GUIDANCE = 4.0
BATCH = 32
EXAMINED = 1050
SEED = 100_000


@dataclass(frozen=True, slots=True)
class Question:
    """One image to draw and judge: its prompt, the object and style it should show, and how it was asked."""

    prompt: str
    target: str
    style: str | None
    kind: str


def draw_images(pipe: Any, prompts: Sequence[str], *, seed: int, label: str = "drawing") -> list[Image.Image]:
    """Draws one image per prompt at the settings that all figures use: 25 steps, guidance 4.

    Image k of a call starts from the noise of seed `seed + k`, whatever the batches.
    """
    images: list[Image.Image] = []
    console = Console(stderr=True)  # stdout may carry a caller's data
    starts = range(0, len(prompts), BATCH)
    for start in track(starts, label, transient=True, console=console, disable=not console.is_terminal):
        part = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(part))]
        images += pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators).images
    return images


def questions(images: int, rng: np.random.Generator) -> list[Question]:
    """Returns the examination: left-out pairs (each three times, but at most one image in eight), and the rest.

    The rest are trained pairs, three in four asked for with the style and one in four without.
    """
    found: list[Question] = []
    held = [(i, j) for i in range(len(OBJECTS)) for j in range(len(STYLES)) if is_held_out(i, j)]
    for i, j in (held * 3)[: images // 8]:
        text = f"{with_article(OBJECTS[i].name)} in the style of {STYLES[j].name}"
        found.append(Question(text, OBJECTS[i].name, STYLES[j].name, "held-out"))
    while len(found) < images:
        i, j = int(rng.integers(len(OBJECTS))), int(rng.integers(len(STYLES)))
        if is_held_out(i, j):
            continue
        if rng.random() < 0.25:
            found.append(Question(captions.bare(OBJECTS[i], rng), OBJECTS[i].name, None, "bare"))
        else:
            found.append(
                Question(captions.styled(OBJECTS[i], STYLES[j], rng), OBJECTS[i].name, STYLES[j].name, "styled")
            )
    return found


def examine(pipe: Any, judge: Judge, *, images: int = EXAMINED, seed: int = SEED) -> dict[str, float]:
    """Draws and judges images with fresh seeds.

    Args:
        pipe: safegen-mini.
        judge: The independent judge.
        images: How many images to draw, at least 16; those of left-out pairs are among them.
        seed: First seed.

    Returns:
        Shares in [0, 1]: `object` and `style` over the trained pairs, `held_out` (object and style both right) over
        the left-out pairs, and how many images each rests on; and the seed.
    """
    asked = questions(images, np.random.default_rng(seed))
    drawn = draw_images(pipe, [q.prompt for q in asked], seed=seed, label="examining")
    seen = judge.pictures(drawn)
    right_object = [q.target == o for q, o in zip(asked, seen.objects, strict=True)]
    right_style = [q.style == s for q, s in zip(asked, seen.styles, strict=True)]
    trained = [k for k, q in enumerate(asked) if q.kind != "held-out"]
    styled = [k for k in trained if asked[k].style is not None]
    held = [k for k, q in enumerate(asked) if q.kind == "held-out"]
    return {
        "object": sum(right_object[k] for k in trained) / len(trained),
        "style": sum(right_style[k] for k in styled) / len(styled),
        "held_out": sum(right_object[k] and right_style[k] for k in held) / len(held),
        "images": float(len(asked)),
        "images_held_out": float(len(held)),
        "seed": float(seed),
    }


def write_grid(pipe: Any, path: Path, *, every: int = 7) -> None:
    """Draws one object in `every` in all styles, one row per object."""
    rows = OBJECTS[::every]
    prompts = [f"{with_article(o.name)} in the style of {s.name}" for o in rows for s in STYLES]
    cells = draw_images(pipe, prompts, seed=1, label="drawing the grid")
    half = -(-len(rows) // 2)
    sheet = Image.new("RGB", (2 * len(STYLES) * 66 + 8, half * 66), "white")
    for k, cell in enumerate(cells):
        row, column = divmod(k, len(STYLES))
        sheet.paste(cell, ((row // half) * (len(STYLES) * 66 + 8) + column * 66, (row % half) * 66))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def write_figures(folder: Path, figures: dict[str, float]) -> None:
    """Writes what `examine` returned into a pipeline folder, and the model card that states it."""
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    write_card(folder)


def main(
    images: Annotated[int, typer.Option(min=16, help="How many images to draw and judge.")] = EXAMINED,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = SEED,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the figures into figures.json and the card.")] = False,
) -> None:
    """Examines the weights of this installation with fresh seeds, and prints the figures."""
    figures = examine(mini.load(), mini.load_judge(), images=images, seed=seed)
    if write:
        write_figures(mini.folder(), figures)
    if as_json:
        sys.stdout.write(json.dumps(figures, indent=1) + "\n")
        return
    console = Console()
    for name in ("object", "style", "held_out"):
        console.print(f"{name:<9} {figures[name]:.1%}")
    console.print(f"over {images} images, {figures['images_held_out']:.0f} of them of pairs left out of training")


if __name__ == "__main__":
    typer.run(main)
