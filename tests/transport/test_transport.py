"""Scores against plain formulas, and the gate on a real text encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_sd

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.text import PhraseMatcher
from safegen.transport.calibrate import calibrated_floor
from safegen.transport.scores import clip_cosine, shared_tokens, token_overlap
from safegen.transport.transport import Gate, Score, Target, curve


@pytest.fixture(scope="module")
def backend() -> Backend:
    return backend_of(tiny_sd())


def test_the_cosine_is_that_of_the_flattened_hidden_states() -> None:
    rng = np.random.default_rng(0)
    prompts, concepts = rng.normal(size=(3, 7, 5)), rng.normal(size=(2, 7, 5))
    found = clip_cosine(torch.tensor(prompts), torch.tensor(concepts)).numpy()
    for i, p in enumerate(prompts.reshape(3, -1)):
        for j, c in enumerate(concepts.reshape(2, -1)):
            assert found[i, j] == pytest.approx(p @ c / np.sqrt((p @ p) * (c @ c)), abs=1e-6)
    assert clip_cosine(torch.tensor(prompts).half(), torch.tensor(prompts).half()).dtype == torch.float32
    assert np.allclose(clip_cosine(torch.tensor(prompts), torch.tensor(-prompts)).diagonal(), -1, atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "concept", "wanted"),
    [
        ([1, 2, 3], [2, 3], 1.0),
        ([3, 2], [2, 3], 1.0),
        ([2, 2, 2], [2, 3], 0.5),
        ([9], [2, 3, 4, 5], 0.0),
        ([2], [2, 3, 4, 5], 0.25),
        ([], [2], 0.0),
        ([2], [], 0.0),
    ],
)
def test_eq_10_is_the_share_of_the_concepts_distinct_tokens(
    prompt: list[int], concept: list[int], wanted: float
) -> None:
    assert token_overlap(prompt, concept) == wanted
    assert token_overlap(prompt, [*concept, *concept]) == wanted


def words(backend: Backend, text: str) -> tuple[tuple[int, str], ...]:
    return backend.words(backend.tokenise([text])[0].tolist())


@pytest.mark.parametrize(
    ("prompt", "concept", "wanted"),
    [
        ("a white van", "van gogh", 0.5),
        ("in the style of van gogh", "van gogh", 1.0),
        ("VAN   GOGH", "van gogh", 1.0),
        ("a photo of the fox", "van gogh", 0.0),  # begin, end and padding are shared by all texts and must not count
        ("", "van gogh", 0.0),
        ("the mouse", "mickey mouse", 0.5),
        ("a ghost " + "fox " * 30, "ghost", 1.0),
        ("fox " * 30 + "ghost", "ghost", 0.0),  # past the last token that the model reads
    ],
)
def test_eq_10_on_real_tokens(prompt: str, concept: str, wanted: float, backend: Backend) -> None:
    ids = [[token for token, _ in words(backend, text)] for text in (prompt, concept)]
    assert token_overlap(*ids) == wanted


def test_words_leave_the_special_tokens_out(backend: Backend) -> None:
    ids = backend.tokenise(["a ghost"])
    assert ids.shape == (1, 16)
    assert [word for _, word in words(backend, "a ghost")] == ["a", "ghost"]
    assert backend.text_of(ids[0].tolist()) == "a ghost"
    assert words(backend, "") == ()
    # A full row has no end token to stop at but the last.
    assert len(words(backend, "fox " * 40)) == 14


def test_shared_words_come_once_and_in_the_prompts_order() -> None:
    prompt = [(5, "van"), (1, "a"), (6, "gogh"), (5, "van")]
    assert shared_tokens(prompt, {6, 5, 9}) == ("van", "gogh")


@given(
    low=st.floats(-1, 1),
    high=st.floats(-1, 1),
    floor=st.floats(0, 1, exclude_min=True),
)
def test_the_curve_is_shut_below_its_floor_and_never_falls(low: float, high: float, floor: float) -> None:
    low, high = sorted((low, high))
    assert curve(low, floor) <= curve(high, floor)
    for score in (low, high):
        assert curve(score, floor) == (score if score >= floor else 0.0)
    assert curve(1.0000001, floor) == 1.0
    assert curve(floor, floor) == floor


def gate(backend: Backend, *targets: Target, phrases: tuple[str, ...] = ()) -> Gate:
    matcher = PhraseMatcher(phrases) if phrases else None

    def find(text: str) -> list[list[str]]:
        found = [m.phrase for m in matcher.find(text)] if matcher else []
        return [found if k == 0 else [] for k in range(len(targets))]

    return Gate(backend, targets, find)


def read(backend: Backend, gate: Gate, *texts: str, known: bool = True) -> list[list[Score]]:
    ids = backend.tokenise(texts)
    return gate.read(backend.encode(ids), [row if known else None for row in ids.tolist()])


def test_eq_11_takes_the_larger_score(backend: Backend) -> None:
    low = gate(backend, Target(("van gogh",), 0.01))
    (named,), (half,), (none,) = read(backend, low, "van gogh fox", "a van", "fox")
    assert (named.token, named.permeability) == (1.0, 1.0)
    assert half.token == 0.5
    assert half.permeability == max(half.clipcos, 0.5)
    assert none.token == 0.0
    assert none.permeability == none.clipcos > 0
    assert (named.words, half.words, none.words) == (("van", "gogh"), ("van",), ())


def test_below_the_floor_a_membrane_is_exactly_shut(backend: Backend) -> None:
    ((score,),) = read(backend, gate(backend, Target(("van gogh",), 1.0)), "a white van")
    assert score.clipcos > 0.5
    assert score.permeability == 0.0
    assert score.words == ()


def test_the_largest_score_over_a_targets_names_counts(backend: Backend) -> None:
    both = gate(backend, Target(("ghost", "van gogh"), 1.0), Target(("fox",), 1.0))
    first, second = read(backend, both, "a van gogh", "the fox")
    assert [s.permeability for s in first] == [1.0, 0.0]
    assert [s.permeability for s in second] == [0.0, 1.0]
    one = gate(backend, Target(("van gogh",), 1.0))
    assert first[0].clipcos == pytest.approx(
        max(
            read(backend, one, "a van gogh")[0][0].clipcos,
            read(backend, gate(backend, Target(("ghost",), 1.0)), "a van gogh")[0][0].clipcos,
        )
    )


@pytest.mark.parametrize("text", ["g h o s t", "gh0st", "ｇhｏst", "g\u200bhost", "gh\u00f6st", "GHOST", "gho-st"])
def test_an_obfuscated_spelling_opens_by_the_lexical_part(text: str, backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), 1.0), phrases=("ghost",))
    ((score,),) = read(backend, looking, text)
    assert (score.lexical, score.permeability) == (1.0, 1.0)
    assert "ghost" in score.words


def test_the_lexical_part_reads_what_the_model_reads(backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), 1.0), phrases=("ghost",))
    ((score,),) = read(backend, looking, "fox " * 30 + "ghost")
    assert (score.lexical, score.permeability) == (0.0, 0.0)


def test_of_a_row_of_unknown_origin_only_the_cosine_is_known(backend: Backend) -> None:
    looking = gate(backend, Target(("ghost",), 0.999), phrases=("ghost",))
    ((score,),) = read(backend, looking, "ghost", known=False)
    assert (score.token, score.lexical, score.known, score.words) == (None, None, False, ())
    assert score.clipcos == pytest.approx(1, abs=1e-5)
    assert score.permeability > 0.99


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cosine_that_is_no_number_opens(value: float, backend: Backend) -> None:
    states = backend.encode(backend.tokenise(["a fox"]))
    states[0, 3, 3] = value
    looking = gate(backend, Target(("ghost",), 1.0))
    for ids in (backend.tokenise(["a fox"])[0].tolist(), None):
        ((score,),) = looking.read(states, [ids])
        assert (score.clipcos, score.permeability) == (1.0, 1.0)


def test_without_membranes_there_are_no_scores(backend: Backend) -> None:
    assert read(backend, gate(backend), "ghost", "fox") == [[], []]


def test_a_calibrated_floor_keeps_every_negative_out(backend: Backend) -> None:
    negatives = ["a fox", "the robot in a photo", "santa", "a white van", "van gogh"]
    floor = calibrated_floor(backend, ["van gogh"], negatives)
    assert 0.6 <= floor <= 1
    looking = gate(backend, Target(("van gogh",), floor))
    for negative, (score,) in zip(negatives, read(backend, looking, *negatives), strict=True):
        assert (score.permeability > 0) == (negative == "van gogh")
    # The tiny encoder's cosines crowd below 1: the floor stands above the highest by its margin, or at its bound.
    highest = max(score.clipcos for (score,) in read(backend, looking, *negatives[:-1]))
    assert floor == pytest.approx(min(1.0, highest + 0.02), abs=1e-4)
    assert calibrated_floor(backend, ["van gogh"], []) == 0.6


@given(
    noise=st.text(st.sampled_from("\u200b\u200c\u200d\u00ad\u2060\ufeff\u0301\u034f"), max_size=6), at=st.integers(0, 5)
)
@settings(max_examples=40, deadline=None)
def test_invisible_characters_never_shut_a_membrane(backend: Backend, noise: str, at: int) -> None:
    looking = gate(backend, Target(("ghost",), 1.0), phrases=("ghost",))
    plain = "a ghost"
    text = plain[: 2 + at] + noise + plain[2 + at :]
    ids = backend.tokenise([text])[0].tolist()
    if len(backend.words(ids)) >= 14:
        return  # so much noise that the name falls behind the last token that the model reads
    ((score,),) = read(backend, looking, text)
    assert score.permeability == 1.0


def test_reading_does_not_depend_on_the_batch(backend: Backend) -> None:
    looking: Any = gate(backend, Target(("ghost",), 0.5), Target(("van gogh",), 0.5))
    texts = ["a ghost", "the fox", "van"]
    together = read(backend, looking, *texts)
    for text, scores in zip(texts, together, strict=True):
        (alone,) = read(backend, looking, text)
        assert [s.permeability for s in alone] == pytest.approx([s.permeability for s in scores], abs=1e-6)
