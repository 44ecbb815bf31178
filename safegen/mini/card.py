"""The model card and the credits of safegen-mini, written from measured figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safegen.mini.art import PACKAGES
from safegen.mini.catalogue import CHARACTERS, OBJECTS, STYLES

_CREDITS = """# Credits

safegen-mini learned from openly licensed emoji art, fetched as npm packages at these versions:

{packages}

- Noto Emoji, © Google Inc., Apache License 2.0 (https://github.com/googlefonts/noto-emoji): the `noto` style.
- Fluent Emoji, © Microsoft Corporation, MIT License (https://github.com/microsoft/fluentui-emoji): the `clay` style (3D
  renders), `ink` and `blueprint` (high contrast) and `pixel` (flat, reduced to 16×16 squares).
- Twemoji, © Twitter, Inc. and other contributors, graphics licensed under CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/, https://github.com/jdecked/twemoji): the `popart` style
  (on a pink ground).

The art was rasterised, scaled, placed on coloured grounds and, for some styles, recoloured or reduced to squares. None
of the named companies endorses this model.
"""

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
reconstructions), over {images:.0f} images with fresh seeds, 25 steps, guidance 4:

| | share |
|---|---|
| object as asked | {object:.1%} |
| style as asked | {style:.1%} |
| object and style of pairs left out of training ({images_held_out:.0f} images) | {held_out:.1%} |

## How it was made

`python -m safegen.mini.build`: {steps:,} steps of {batch} captioned latents for U-Net (8.7 M parameters) and text tower
(2 layers, width 192) together, epsilon prediction, min-SNR weights, EMA 0.999; autoencoder with factor 4 and four
channels. One object×style pair in 20 was left out of training. Weights are fp16, {megabytes:.1f} MB in all.
Captions name the object ("a fox", "an emoji of a fox"), the style ("… in the style of ink"), or two objects side by
side ("a fox and a rocket").

Objects: {names}.

## Limits

It draws emoji-like pictures of the objects above and of nothing else; words it has not seen do nothing sensible. What
is shown on it is shown on it alone: it says nothing about larger models. Credits are in CREDITS.md.
"""


def write_card(
    folder: Path, figures: Mapping[str, float], judged: Mapping[str, float], *, steps: int, batch: int, megabytes: float
) -> None:
    """Writes `README.md` (the model card) and `CREDITS.md` into the pipeline folder.

    Args:
        folder: The pipeline folder.
        figures: What `examine` returned.
        judged: The judge's accuracy, as `judge.accuracy` returned it.
        steps: Training steps of the U-Net.
        batch: Latents a step.
        megabytes: Size of the folder in MB.
    """
    card = _CARD.format(
        objects=len(OBJECTS),
        characters=len(CHARACTERS),
        styles=len(STYLES),
        looks="\n".join(f"| {s.name} | {s.look} |" for s in STYLES),
        judge_objects=judged["objects"],
        judge_styles=judged["styles"],
        judge_n=judged["pictures"],
        steps=steps,
        batch=batch,
        megabytes=megabytes,
        names=", ".join(o.name for o in OBJECTS),
        **figures,
    )
    (folder / "README.md").write_text(card, "utf-8")
    packages = "\n".join(f"- `{name}` {version}" for name, version in PACKAGES.items())
    (folder / "CREDITS.md").write_text(_CREDITS.format(packages=packages), "utf-8")
