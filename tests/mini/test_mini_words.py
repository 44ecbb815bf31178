"""The words of safegen-mini: catalogue, captions, tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from safegen.mini import captions, zoo
from safegen.mini.catalogue import CHARACTERS, OBJECT_NAMES, OBJECTS, STYLE_NAMES, STYLES, is_held_out, with_article
from safegen.training.config import TrainConfig


def test_the_catalogue_is_as_large_as_promised() -> None:
    assert 120 <= len(OBJECTS) <= 200
    assert len(STYLES) >= 5
    assert len(CHARACTERS) >= 15
    assert len(set(OBJECT_NAMES)) == len(OBJECT_NAMES)


def test_one_pair_in_twenty_is_left_out_and_every_object_and_style_is_learned() -> None:
    left_out = [(i, j) for i in range(len(OBJECTS)) for j in range(len(STYLES)) if is_held_out(i, j)]
    assert len(left_out) == pytest.approx(len(OBJECTS) * len(STYLES) / 20, rel=0.2)
    assert all(sum((i, j) in left_out for j in range(len(STYLES))) <= 1 for i in range(len(OBJECTS)))
    assert all(sum((i, j) in left_out for i in range(len(OBJECTS))) < len(OBJECTS) / 10 for j in range(len(STYLES)))


def test_every_caption_word_is_one_token_and_any_text_can_be_encoded() -> None:
    tokenizer = captions.new_tokenizer()
    for word in set(captions.words()):
        assert len(tokenizer(word).input_ids) == 3, word
    odd = "naïve 🐕 ЛЮБОВЬ  van\u200bgogh"
    assert str(tokenizer.decode(tokenizer(odd).input_ids, skip_special_tokens=True)).split()[0] == "naïve"


def test_captions_name_what_they_are_of() -> None:
    rng = np.random.default_rng(0)
    for item in OBJECTS:
        names = (item.name, *item.synonyms)
        text = captions.bare(item, rng)
        assert any(name in text for name in names)
        for style in STYLES:
            text = captions.styled(item, style, rng)
            assert any(name in text for name in names)
            assert style.name in text
    both = captions.scene(OBJECTS[0], OBJECTS[30], STYLES[0], rng)
    assert any(n in both for n in (OBJECTS[0].name, *OBJECTS[0].synonyms))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("owl", "an owl"),
        ("fox", "a fox"),
        ("scissors", "scissors"),
        ("santa claus", "santa claus"),
        ("unicorn", "a unicorn"),
    ],
)
def test_articles(name: str, wanted: str) -> None:
    assert with_article(name) == wanted


@pytest.mark.parametrize("concept", zoo.CONCEPTS)
def test_plans_keep_the_target_out_of_the_anchor_pool(concept: str) -> None:
    plan = zoo.plan(concept)
    for text in plan.pool:
        assert not any(f" {target} " in f" {text} " for target in plan.targets), text
    for template, rest in plan.templates:
        assert "{}" in template
        assert not any(target in rest for target in plan.targets)
    TrainConfig(concept=concept, targets=plan.targets, templates=plan.templates)


def test_the_shipped_concepts_are_three_characters_two_styles_and_an_everyday_object() -> None:
    entries = [zoo.find(c) for c in zoo.CONCEPTS]
    assert sum(e in CHARACTERS for e in entries) >= 3
    assert sum(e in STYLES for e in entries) >= 2
    assert sum(e in OBJECTS and e not in CHARACTERS for e in entries) >= 1
    assert set(STYLE_NAMES) & set(zoo.CONCEPTS) == {"popart", "blueprint"}


@pytest.mark.parametrize("concept", zoo.CONCEPTS)
def test_what_is_alike_can_be_drawn_and_is_of_the_same_kind_and_not_shipped(concept: str) -> None:
    kind = OBJECT_NAMES if zoo.find(concept).name in OBJECT_NAMES else STYLE_NAMES
    assert len(set(zoo.alike(concept))) >= 4
    assert set(zoo.alike(concept)) <= set(kind) - {zoo.find(shipped).name for shipped in zoo.CONCEPTS}
