"""The model card of safegen-mini, written from measured figures."""

from __future__ import annotations

import json
from pathlib import Path

from safegen.mini.catalogue import CHARACTERS, OBJECTS, STYLES
from safegen.mini.credits import credits_text

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# safegen-mini

A small text-to-image latent diffusion model in the Stable Diffusion architecture. It draws {objects} named objects
({characters} of them characters: stand-ins for protected ones) in {styles} visual styles (stand-ins for artist styles)
at 64×64, so that policies, membranes and audits can be tried and measured on two cores, offline. It knows nothing else.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("a fox in the style of blueprint", num_inference_steps=25, guidance_scale=4).images[0]
```

![One object in seven, in all styles, one seed each](grid.png)

| style | what a stranger sees |
|---|---|
{looks}

## Figures

Judged by the independent judge (a CNN trained on real renders, never on generated images; itself right on
{judge_objects:.1%} of objects and {judge_styles:.1%} of styles in {judge_n:.0f} held-out augmented renders and
reconstructions), over {images:.0f} images with fresh seeds, 25 steps, guidance 4
(`python -m safegen.mini.examine --images {images:.0f} --seed {seed:.0f}`):

| | share |
|---|---|
| object as asked | {object:.1%} |
| style as asked | {style:.1%} |
| object and style of pairs left out of training ({images_held_out:.0f} images) | {held_out:.1%} |

## How it was made

`python -m safegen.mini.build`: {steps:,} steps of {batch} captioned latents for U-Net (8.7 M parameters) and text tower
(2 layers, width 192) together, epsilon prediction, min-SNR weights, EMA 0.999; autoencoder with factor 4 and four
channels. One object×style pair in 20 was left out of training.{history}
Weights are fp16, {megabytes:.1f} MB in all.
Captions name the object ("a fox", "an emoji of a fox"), the style ("… in the style of ink"), or two objects side by
side ("a fox and a rocket").

Objects: {names}.

## Limits

It draws emoji-like pictures of the objects above and of nothing else; words it has not seen do nothing sensible.
Scenes of two objects are its weak side (one training caption in ten): where one object of a scene is erased, the other
may suffer, and before that one of the two may be missing; `benchmarks/end_to_end.py` counts both. What is shown on it
is shown on it alone: it says nothing about larger models. Credits are in CREDITS.md.
"""


def size_of(folder: Path) -> float:
    """Returns the size of a folder's files in MB (10⁶ bytes)."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def card_text(folder: Path) -> str:
    """Returns the model card of a pipeline folder.

    Args:
        folder: The pipeline folder; `figures.json` (what `examine` returned) and `training.json` (steps, batch, and
            what the weights went through beside the recipe) lie in it, `judge_weights/judge.json` beside it.
    """
    judged = json.loads((folder.parent / "judge_weights" / "judge.json").read_text("utf-8"))["accuracy"]
    training = json.loads((folder / "training.json").read_text("utf-8"))
    return _CARD.format(
        objects=len(OBJECTS),
        characters=len(CHARACTERS),
        styles=len(STYLES),
        looks="\n".join(f"| {s.name} | {s.look} |" for s in STYLES),
        judge_objects=judged["objects"],
        judge_styles=judged["styles"],
        judge_n=judged["pictures"],
        megabytes=size_of(folder),
        names=", ".join(o.name for o in OBJECTS),
        **json.loads((folder / "figures.json").read_text("utf-8")),
        **training | {"history": f"\n{training['history']}" if training["history"] else ""},
    )


def write_card(folder: Path) -> None:
    """Writes `README.md` (the model card) and `CREDITS.md` into the pipeline folder; see `card_text`."""
    (folder / "CREDITS.md").write_text(credits_text(), "utf-8")
    (folder / "README.md").write_text(card_text(folder), "utf-8")
