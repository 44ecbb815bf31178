"""Sheets of pairs that a stranger can read."""

from __future__ import annotations

from PIL import Image, ImageChops

from safegen.evaluation.sheet import Pair, pairs_sheet

RED, BLUE = Image.new("RGB", (64, 64), "#ff0000"), Image.new("RGB", (64, 64), "#0000ff")


def test_every_pair_has_its_prompt_below_it() -> None:
    prompts = ["a ghost", "an emoji of a ghost in the style of blueprint " * 3, "x" * 200]
    blank = pairs_sheet([Pair("", RED, BLUE)] * 3, columns=2)
    sheet = pairs_sheet([Pair(prompt, RED, BLUE) for prompt in prompts], columns=2)
    assert sheet.size == blank.size
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    assert colours[255, 0, 0] == colours[0, 0, 255] == 3 * 112 * 112  # text never runs into a picture
    boxes = [(left, top + 226, left + 124, top + 278) for left, top in ((12, 12), (136, 12), (12, 289))]
    for box in boxes:
        assert ImageChops.difference(sheet.crop(box), blank.crop(box)).getbbox() is not None
