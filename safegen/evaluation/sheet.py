"""Pictures for people: text on a sheet, and pairs of images with their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_CELL = 112
_GAP = 12
_LINE = 13
_SEAM = 2  # between the two images of a pair
_BELOW = 2 * _CELL + _SEAM
_LINES = 3  # of a prompt, below its pair
_INK = "#1a1a1a"


def write_line(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, *, size: int, width: int, colour: str = _INK
) -> None:
    """Writes one line, shortened to `width` pixels; characters that Pillow's own font may lack become "?"."""
    font = ImageFont.load_default(size)
    text = text.encode("ascii", "replace").decode("ascii")
    while font.getlength(text) > width:
        text = text.removesuffix("...")[:-1] + "..."
    pen.text(at, text, fill=colour, font=font)


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, drawn twice."""

    prompt: str
    before: Image.Image
    after: Image.Image


def pairs_sheet(pairs: Sequence[Pair], *, columns: int = 8) -> Image.Image:
    """Puts pairs on one sheet: before above after, the prompt below them."""
    height = _BELOW + _LINES * _LINE + _GAP
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, -(-len(pairs) // columns) * height + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for k, pair in enumerate(pairs):
        left, top = _GAP + (k % columns) * (_CELL + _GAP), _GAP + (k // columns) * height
        for half, image in enumerate((pair.before, pair.after)):
            sheet.paste(image.resize((_CELL, _CELL), Image.Resampling.NEAREST), (left, top + half * (_CELL + _SEAM)))
        for line, text in enumerate(_wrapped(pair.prompt, size=11, width=_CELL)[:_LINES]):
            write_line(pen, (left, top + _BELOW + 2 + line * _LINE), text, size=11, width=_CELL)
    return sheet


def _wrapped(text: str, *, size: int, width: int) -> list[str]:
    """Breaks a text at its spaces into lines of at most `width` pixels (a longer word gets a line of its own)."""
    font = ImageFont.load_default(size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
