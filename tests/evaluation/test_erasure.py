"""The prompts and comparisons behind the figures."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from safegen import mini
from safegen.evaluation.erasure import Case, Drawn, cases, grid, identical, neighbours
from safegen.mini import zoo
from safegen.mini.catalogue import OBJECT_NAMES, STYLE_NAMES


@pytest.fixture(scope="module")
def pipe() -> Any:
    return mini.load()


@pytest.mark.parametrize("concept", zoo.CONCEPTS)
def test_neighbours_and_unrelated_prompts_name_no_shipped_concept(pipe: Any, concept: str) -> None:
    names = [n for c in zoo.CONCEPTS for n in (zoo.find(c).name, *getattr(zoo.find(c), "synonyms", ()))]
    for group in ("neighbour", "unrelated"):
        for case in cases(pipe, concept, group, 100, seed=0):
            assert not any(f" {name} " in f" {case.prompt} ".replace(",", " ") for name in names), case.prompt
    assert all(zoo.find(concept).name in (c.object, c.style) for c in cases(pipe, concept, "target", 50, seed=0))


def test_unrelated_prompts_keep_away_from_the_neighbours(pipe: Any) -> None:
    near = neighbours(pipe, "ghost")
    assert len(near) == 5
    assert set(near) <= set(OBJECT_NAMES)
    assert not {c.object for c in cases(pipe, "ghost", "unrelated", 200, seed=0)} & set(near)
    assert set(neighbours(pipe, "popart")) <= set(STYLE_NAMES) - {"popart", "blueprint"}


def test_accuracy_asks_for_object_and_style_and_target_for_the_concept() -> None:
    asked = (
        Case("ghost", "target", "a ghost", "ghost", None),
        Case("ghost", "target", "a ghost in the style of ink", "ghost", "ink"),
    )
    image = Image.new("RGB", (64, 64))
    drawn = Drawn(asked, (image, image), ("ghost", "ghost"), ("noto", "noto"))
    assert drawn.accuracy() == 0.5
    assert drawn.judged_as("ghost") == 1.0
    other = Drawn(asked, (image, Image.new("RGB", (64, 64), "red")), ("fox", "fox"), ("ink", "ink"))
    assert other.accuracy() == 0.0
    assert identical(drawn, other) == [True, False]
    assert grid([(image, image)] * 9, columns=8).size == (8 * 68, 2 * 138)
