"""The prompts and comparisons behind the figures."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from safegen import mini
from safegen.evaluation.erasure import (
    Case,
    Drawn,
    DrawnScenes,
    Scene,
    cases,
    draw_scenes,
    identical,
    neighbours,
    scenes,
)
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
    near = {concept: neighbours(pipe, concept) for concept in zoo.CONCEPTS}
    assert len(near["ghost"]) == len(set(near["ghost"])) == 9
    assert set(near["ghost"]) <= set(OBJECT_NAMES)
    asked = cases(pipe, "ghost", "unrelated", 200, seed=0)
    for names in near.values():
        assert not {c.object for c in asked} & set(names)
        assert not any(f" {name} " in f" {c.prompt} " for c in asked for name in names), names
    assert set(near["popart"]) == set(STYLE_NAMES) - {"popart", "blueprint"}


def test_neighbour_prompts_name_the_nearest_by_words_and_those_named_by_hand(pipe: Any) -> None:
    assert "motorcycle" in neighbours(pipe, "bicycle")
    asked = cases(pipe, "bicycle", "neighbour", 20, seed=0)
    assert {c.object for c in asked} == set(neighbours(pipe, "bicycle"))


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


def test_scenes_hold_the_concept_on_either_side_and_something_else(pipe: Any) -> None:
    asked = scenes("ghost", 60, seed=0)
    assert {scene.target for scene in asked} == {"ghost"}
    shipped = {zoo.find(concept).name for concept in zoo.CONCEPTS}
    assert not {scene.other for scene in asked} & shipped
    first = [min(scene.prompt.find(name) for name in ("ghost", "phantom") if name in scene.prompt) for scene in asked]
    assert min(first) < 12 < max(first)


def test_a_scene_is_judged_half_by_half(pipe: Any) -> None:
    asked = [Scene("a rocket and a fox in the style of popart", "rocket", "fox")] * 4
    drawn = draw_scenes(pipe, mini.load_judge(), asked, seed=1, label="scenes")
    assert all(len(seen) in (1, 2) for seen in drawn.seen)
    counted = DrawnScenes(
        tuple(asked), (frozenset({"rocket", "fox"}), frozenset({"rocket"}), *[frozenset({"owl"})] * 2)
    )
    assert (counted.target_seen(), counted.other_seen()) == (0.5, 0.25)
