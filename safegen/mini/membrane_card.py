"""The card and the figures beside a shipped membrane: `card.md`, `figures.json`, `grid.png`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

from safegen.bundle.store import MEMBRANE_FILE
from safegen.membrane.file import read_with_digest
from safegen.training.config import TrainConfig
from safegen.transport.calibration import parse, section

FIGURES_FILE = "figures.json"


class Figures(TypedDict):
    """What was measured of a membrane; shares in [0, 1], closed and forced open.

    `neighbours` are the names behind `neighbour`; `seconds` and `threads` are those of its training.
    """

    images: int
    target: tuple[float, float]
    neighbour: tuple[float, float]
    unrelated: tuple[float, float]
    neighbours: tuple[str, ...]
    seconds: float
    threads: int


def read_figures(folder: Path) -> Figures:
    """Reads the figures beside a membrane."""
    return json.loads((folder / FIGURES_FILE).read_text("utf-8"))


def write_card(folder: Path, figures: Figures) -> None:
    """Writes `figures.json` and `card.md` beside the membrane in `folder`."""
    (folder / FIGURES_FILE).write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    (folder / "card.md").write_text(card_text(folder), "utf-8")


def card_text(folder: Path) -> str:
    """Returns the card of the membrane in `folder`, from its file and the figures beside it."""
    membrane, sha256 = read_with_digest(folder / MEMBRANE_FILE)
    figures = read_figures(folder)
    config = TrainConfig(**json.loads(membrane.metadata["safegen.training"]))
    shares = {
        f"{group}_{when}": figures[group][k]
        for group in ("target", "neighbour", "unrelated")
        for k, when in enumerate(("before", "after"))
    }
    return _CARD.format(
        name=membrane.targets[0],
        concept=membrane.concept,
        targets=", ".join(membrane.targets),
        calibration=section(parse(membrane.metadata)).rstrip(),
        settings=membrane.metadata["safegen.training_digest"][:16],
        sha256=sha256,
        parameters=membrane.parameter_count(),
        near=", ".join(figures["neighbours"]),
        images=figures["images"],
        seconds=figures["seconds"],
        held=", and the look-alikes named by hand held in its own prompts" if config.neighbours else "",
        threads=f"{figures['threads']} core{'s' if figures['threads'] > 1 else ''}",
        **config.model_dump(include={"iterations", "rank", "eta", "anchoring", "anchors"}),
        **shares,
    )


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
| of its neighbours: drawn as asked | {neighbour_before:.1%} | {neighbour_after:.1%} |
| of other things: drawn as asked | {unrelated_before:.1%} | {unrelated_after:.1%} |

Measured by `python -m safegen.mini.measure_zoo --concept {concept} --images {images}`.

- Neighbours: {near}. They are the nearest by the text encoder, and those that a person might confuse with it or that
  look alike, named by hand (`policies/concepts/mini.yaml`).
- Other things are neither shipped concepts nor neighbours of any of them.

Under a policy the gate keeps it exactly shut for the last two groups, and their images come out bit for bit as without
it (`benchmarks/end_to_end.py`).

## How it was made

`python -m safegen.mini.train_zoo --concept {concept} --out OUT`, SPM's erasing loss with latent anchoring
([reference](../../../docs/reference/training.md)):
{iterations} iterations in {seconds:.0f} s on {threads}, rank {rank}, η = {eta}, λ = {anchoring}, anchors drawn by
`{anchors}`{held}. Settings digest `{settings}`. File sha256 `{sha256}`, {parameters:,} values.

{calibration}
"""
