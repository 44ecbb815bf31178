"""Scores and curves against plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safegen.errors import UsageError
from safegen.transport.curve import Curve, permeabilities
from safegen.transport.scores import change, clip_cosine, direction, evidence, largest, lexical, token_overlap


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
    assert token_overlap([prompt], [concept]).item() == wanted
    assert token_overlap([prompt], [[*concept, *concept]]).item() == wanted


def test_overlap_of_many_is_that_of_each() -> None:
    prompts, concepts = [[1, 2], [], [4, 4, 9]], [[2], [4, 9], [1, 2, 3, 4]]
    each = [[token_overlap([p], [c]).item() for c in concepts] for p in prompts]
    assert token_overlap(prompts, concepts).tolist() == each == [[1, 0, 0.5], [0, 0, 0], [0, 1, 0.25]]


def test_direction_is_the_cosine_of_the_mean_changes() -> None:
    rng = np.random.default_rng(1)
    empty, prompts, concept = rng.normal(size=(6, 4)), rng.normal(size=(3, 6, 4)), rng.normal(size=(6, 4))
    changes = [change(torch.tensor(states), torch.tensor(empty)) for states in (prompts, concept[None])]
    found = direction(*changes)
    wanted_concept = (concept - empty).mean(axis=0)
    for k, states in enumerate(prompts):
        p = (states - empty).mean(axis=0)
        cosine = p @ wanted_concept / math.sqrt((p @ p) * (wanted_concept @ wanted_concept))
        assert found[k, 0].item() == pytest.approx(cosine, abs=1e-6)


def test_the_empty_prompt_has_no_direction_and_the_concept_has_its_own() -> None:
    empty, concept = torch.randn(6, 4), torch.randn(6, 4)
    found = change(torch.stack([empty, concept]), empty)
    assert found[0].tolist() == [0.0] * 4
    assert direction(found, found[1:]).squeeze(1).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_the_same_change_at_other_positions_scores_the_same() -> None:
    empty = torch.randn(6, 4)
    difference = torch.randn(6, 4)
    difference[0] = 0  # the begin token
    moved = torch.cat([difference[:1], difference[1:].roll(2, dims=0)])
    found = change(torch.stack([empty + difference, empty + moved]), empty)
    torch.testing.assert_close(found[0], found[1])


def test_a_row_with_fewer_tokens_is_compared_with_as_many() -> None:
    empty, states = torch.randn(6, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(change(states, empty), change(states, empty[:3]))


def test_lexical_is_0_or_1() -> None:
    assert lexical([{0, 2}, set(), [1, 1]], 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert lexical([set()], 0).shape == (1, 0)


def test_the_largest_over_names() -> None:
    scores = torch.tensor([[0.1, 0.7, -0.5], [0.3, 0.2, 0.9]])
    found = largest(scores, torch.tensor([0, 0, 2]), 3)
    assert torch.equal(found, torch.tensor([[0.7, -1, -0.5], [0.3, -1, 0.9]]))


def test_evidence_is_the_fall() -> None:
    assert evidence(torch.tensor([0.9]), torch.tensor([[0.2], [0.95]])).squeeze(1).tolist() == pytest.approx(
        [0.7, -0.05]
    )


@given(
    score=st.floats(-1, 1),
    other=st.floats(-1, 1),
    thresholds=st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted),
)
def test_the_curve_is_shut_below_lo_full_from_hi_and_never_falls(
    score: float, other: float, thresholds: list[float]
) -> None:
    lo, hi = thresholds
    low, high = sorted((score, other))
    scores = torch.tensor([[low], [high], [lo], [hi]], dtype=torch.float64)
    a, b, at_lo, at_hi = permeabilities(scores, [Curve(lo, hi)]).squeeze(1).tolist()
    assert 0 <= a <= b <= 1
    for value, gamma in ((low, a), (high, b)):
        assert gamma == 0 or value >= lo
        assert gamma == 1 or value < hi
    assert at_lo == (1 if lo == hi else 0)
    assert at_hi == 1


def test_a_target_without_a_curve_stays_shut() -> None:
    scores = torch.tensor([[1.0, 0.5]])
    assert permeabilities(scores, [None, Curve(0, 1)]).tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize(("lo", "hi"), [(0.5, 0.4), (math.nan, 1), (0, math.inf)])
def test_thresholds_that_are_none_are_refused(lo: float, hi: float) -> None:
    with pytest.raises(UsageError, match="lo not above hi"):
        Curve(lo, hi)
