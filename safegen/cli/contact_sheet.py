"""The demo's picture: pairs of images, base model and with policy, with what a stranger needs to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from safegen.evaluation.sheet import write_line

_CELL = 128
_GAP = 6  # between the two images of a pair
_PAIR = 2 * _CELL + _GAP
_MARGIN = 24
_PAIRS_PER_ROW = 4
_LINE = 16
_TEXT = 3 * _LINE + 10  # below a pair: prompt, what happened, what the judge sees
_HEADING = 54  # a group's heading, and the words above its columns

_GREY, _GREEN, _BLUE, _RED = "#666666", "#1a7f37", "#0b57d0", "#b3261e"


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, drawn twice.

    Attributes:
        prompt: The prompt.
        base: The image without the policy.
        guarded: The image with it.
        identical: Whether the two are equal bit for bit.
        action: What the policy did, for people ("membrane of ghost opened"); "" for nothing.
        seen: What a judge sees in the two; "" without a judge.
    """

    prompt: str
    base: Image.Image
    guarded: Image.Image
    identical: bool
    action: str
    seen: str


@dataclass(frozen=True, slots=True)
class Group:
    """Pairs under one heading."""

    heading: str
    pairs: tuple[Pair, ...]

    @property
    def rows(self) -> int:
        """Rows of pairs."""
        return -(-len(self.pairs) // _PAIRS_PER_ROW)

    @property
    def height(self) -> int:
        """Pixels that the group takes."""
        return _HEADING + self.rows * (_CELL + _TEXT + 12)


def contact_sheet(title: str, groups: Sequence[Group]) -> Image.Image:
    """Lays the groups out below each other.

    Args:
        title: One line at the top.
        groups: In order of appearance.
    """
    width = _PAIRS_PER_ROW * (_PAIR + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, 76 + sum(group.height for group in groups) + _MARGIN // 2), "white")
    pen = ImageDraw.Draw(sheet)
    write_line(pen, (_MARGIN, 16), title, size=22, width=width - 2 * _MARGIN)
    explained = "Each pair: the same prompt and seed, drawn by the base model (left) and with the policy (right)."
    write_line(pen, (_MARGIN, 46), explained, size=14, colour=_GREY, width=width - 2 * _MARGIN)
    top = 76
    for group in groups:
        write_line(pen, (_MARGIN, top + 6), group.heading, size=17, width=width - 2 * _MARGIN)
        for column in range(min(len(group.pairs), _PAIRS_PER_ROW)):
            left = _MARGIN + column * (_PAIR + _MARGIN)
            for k, name in enumerate(("base", "with policy")):
                write_line(pen, (left + k * (_CELL + _GAP), top + 34), name, size=12, colour=_GREY, width=_CELL)
        for index, pair in enumerate(group.pairs):
            row, column = divmod(index, _PAIRS_PER_ROW)
            corner = (_MARGIN + column * (_PAIR + _MARGIN), top + _HEADING + row * (_CELL + _TEXT + 12))
            _draw_pair(sheet, pen, corner, pair)
        top += group.height
    return sheet


def _draw_pair(sheet: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], pair: Pair) -> None:
    left, top = corner
    for k, image in enumerate((pair.base, pair.guarded)):
        # Whole multiples keep the pixels of a small image; a large one is scaled down smoothly.
        how = Image.Resampling.NEAREST if image.width <= _CELL else Image.Resampling.LANCZOS
        place = (left + k * (_CELL + _GAP), top)
        sheet.paste(image.convert("RGB").resize((_CELL, _CELL), how), place)
        pen.rectangle((place[0] - 1, top - 1, place[0] + _CELL, top + _CELL), outline="#cccccc")
    below = top + _CELL + 5
    write_line(pen, (left, below), f'"{pair.prompt}"', size=13, width=_PAIR)
    outcome = "bit-identical" if pair.identical else "changed"
    text = f"{outcome}; {pair.action}" if pair.action else outcome
    colour = _GREEN if pair.identical else _BLUE if pair.action else _RED  # red: changed, and nothing says why
    write_line(pen, (left, below + _LINE), text, size=12, colour=colour, width=_PAIR)
    if pair.seen:
        write_line(pen, (left, below + 2 * _LINE), f"judge sees: {pair.seen}", size=12, colour=_GREY, width=_PAIR)
