"""The training pictures: emoji art fetched with the npm client, and drawn in the six styles of safegen-mini.

A *sprite* is one object's art in one style's source set, RGBA, 128×128, transparent around it. A *picture* is what the
model learns: one or two sprites placed on a 64×64 canvas and finished in a style (ground colour, line colour, pixels).
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safegen.errors import TrainingError
from safegen.mini.catalogue import OBJECTS, STYLES, Object

SIZE = 64
SPRITE_SIZE = 128
PIXEL = 4  # edge of one square of the pixel style; equal to the autoencoder's factor, so that squares fit its grid

# The exact versions whose art the shipped model learned from.
PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@lobehub/fluent-emoji-3d": "1.1.0",
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "noto": (255, 255, 255),
    "popart": (255, 84, 158),
    "clay": (222, 216, 240),
    "ink": (255, 255, 255),
    "blueprint": (28, 74, 170),
    "pixel": (36, 138, 138),
}
LINES: dict[str, tuple[int, int, int]] = {"ink": (16, 16, 16), "blueprint": (255, 255, 255)}

Sprite = NDArray[np.uint8]  # [128, 128, 4]
Picture = NDArray[np.uint8]  # [64, 64, 3]


@dataclass(frozen=True, slots=True)
class Box:
    """Where a sprite goes on the canvas: its left, top and edge in canvas pixels."""

    left: float
    top: float
    edge: float


def fetch(folder: Path) -> None:
    """Installs the emoji packages into `folder` with the npm client; does nothing where they are present.

    Raises:
        TrainingError: npm is not on the PATH, or it failed (its own words are in the message).
    """
    modules = folder / "node_modules"
    if all((modules / name / "package.json").is_file() for name in PACKAGES):
        return
    npm = shutil.which("npm")
    if npm is None:
        raise TrainingError("npm was not found on the PATH; it fetches the emoji art. Install Node.js and run again.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"name": "safegen-mini-art", "private": true}\n')
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    done = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", *wanted], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise TrainingError(f"npm install in {folder} failed ({done.returncode}): {done.stderr.strip()[-800:]}")


class IconSet:
    """One iconify set: its icons as stand-alone SVG documents."""

    def __init__(self, path: Path) -> None:
        self._data = json.loads(path.read_text("utf-8"))

    def svg(self, name: str) -> str | None:
        """Returns the SVG of an icon or of the icon that `name` is an alias of; None where the set lacks it."""
        icon = self._data["icons"].get(name)
        if icon is None:
            alias = self._data.get("aliases", {}).get(name)
            if alias is None:
                return None
            icon = self._data["icons"][alias["parent"]]
        width = icon.get("width", self._data.get("width", 16))
        height = icon.get("height", self._data.get("height", 16))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" color="#000">{icon["body"]}</svg>'
        )


def _rasterise(svg: str) -> Sprite:
    import resvg_py  # the `mini` extra: only the recipe needs it

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_SIZE, height=SPRITE_SIZE)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return np.asarray(image.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS))


def _codepoints(chars: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for codepoint, name in json.loads(chars.read_text("utf-8")).items():
        names.setdefault(name, codepoint)
    return names


def _rendered_3d(item: Object, folder: Path, codepoints: dict[str, str]) -> Sprite | None:
    codepoint = codepoints.get(item.icon)
    for stem in (f"{codepoint}", f"{codepoint}-fe0f"):
        path = folder / f"{stem}.webp"
        if path.is_file():
            image = Image.open(path).convert("RGBA")
            return np.asarray(image.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS))
    return None


def load_sprites(folder: Path) -> NDArray[np.uint8]:
    """Rasterises every object in every style's source set.

    Args:
        folder: Where `fetch` put the packages.

    Returns:
        Sprites [objects, styles, 128, 128, 4], uint8, in the order of the catalogue.

    Raises:
        TrainingError: An object is missing from a set; all missing ones are listed.
    """
    modules = folder / "node_modules"
    sets = {s.source: IconSet(modules / s.source / "icons.json") for s in STYLES if s.name != "clay"}
    codepoints = _codepoints(modules / "@iconify-json/noto" / "chars.json")
    sprites = np.zeros((len(OBJECTS), len(STYLES), SPRITE_SIZE, SPRITE_SIZE, 4), np.uint8)
    missing: list[str] = []
    for i, item in enumerate(OBJECTS):
        for j, style in enumerate(STYLES):
            if style.name == "clay":
                sprite = _rendered_3d(item, modules / style.source / "assets", codepoints)
            else:
                icons = sets[style.source]
                svg = icons.svg(item.icon) or icons.svg(f"person-{item.icon}")
                sprite = _rasterise(svg) if svg else None
            if sprite is None:
                missing.append(f"{item.icon} in {style.source}")
            else:
                sprites[i, j] = sprite
    if missing:
        raise TrainingError(f"{len(missing)} icons are not in the fetched packages: {', '.join(missing)}")
    return sprites


def _place(sprite: Sprite, box: Box, resample: Image.Resampling) -> Image.Image:
    edge = max(1, round(box.edge))
    layer = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    layer.paste(Image.fromarray(sprite).resize((edge, edge), resample), (round(box.left), round(box.top)))
    return layer


def draw(sprites: Sequence[Sprite], boxes: Sequence[Box], style: str) -> Picture:
    """Draws sprites into their boxes and finishes the picture in a style.

    Args:
        sprites: Art from the style's own source set, [128, 128, 4] each.
        boxes: One box per sprite, in canvas pixels.
        style: A name of `STYLE_NAMES`.

    Returns:
        The picture, [64, 64, 3], uint8.
    """
    canvas = Image.new("RGBA", (SIZE, SIZE), (*GROUNDS[style], 255))
    for sprite, box in zip(sprites, boxes, strict=True):
        if style in LINES:
            line = np.empty_like(sprite)
            line[..., :3] = LINES[style]
            line[..., 3] = sprite[..., 3]
            sprite = line
        canvas.alpha_composite(_place(sprite, box, Image.Resampling.LANCZOS))
    if style == "pixel":
        grid = SIZE // PIXEL
        canvas = canvas.resize((grid, grid), Image.Resampling.BOX).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return np.asarray(canvas.convert("RGB"))


def single_box(rng: np.random.Generator) -> Box:
    """Returns a box for one object: nearly the whole canvas, shifted and scaled a little."""
    edge = rng.uniform(54, 62)
    slack = SIZE - edge
    return Box(float(rng.uniform(0, slack)), float(rng.uniform(0, slack)), float(edge))


def steady_box(rng: np.random.Generator) -> Box:
    """Returns a box for one object as the diffusion model learns it: centred, give or take a pixel.

    The autoencoder and the judge see objects shifted by several pixels (`single_box`); the diffusion model, shown the
    same, first spends its few steps on blurs that average over all places.
    """
    edge = rng.uniform(58, 60)
    left, top = (SIZE - edge) / 2 + rng.uniform(-1, 1, size=2)
    return Box(float(left), float(top), float(edge))


def scene_boxes(rng: np.random.Generator) -> tuple[Box, Box]:
    """Returns boxes for two objects side by side, each in its half of the canvas."""
    boxes: list[Box] = []
    for left in (0, SIZE // 2):
        edge = rng.uniform(29, 32)
        boxes.append(Box(left + float(rng.uniform(0, 32 - edge)), float(rng.uniform(14, 34 - edge + 14)), float(edge)))
    return boxes[0], boxes[1]
