"""What holds of every prompt and every batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import WORDS, applied, draw, random_membrane, tiny_sd
from torch import Tensor

from safegen import Guard
from safegen.audit import HmacKey
from safegen.gatekeeper import Decision

GRAVITY = {"allow": 0, "flag": 1, "erase": 2, "refuse": 3}
PROMPT = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)
NOISE = st.text(st.sampled_from("\u200b\u200c\u200d\u00ad\u2060\ufeff\u0301\u0336\u034f"), min_size=1, max_size=2)


@pytest.fixture(scope="module")
def pipes() -> tuple[Any, Any]:
    return tiny_sd(tokens=40), tiny_sd(tokens=40)  # so that no noise pushes a name behind the last token


@pytest.fixture(scope="module")
def guard(pipes: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    folder: Path = tmp_path_factory.mktemp("guard")
    membranes = [random_membrane(pipes[0], c, floor=1.0, seed=k) for k, c in enumerate(("ghost", "van-gogh", "fox"))]
    rules = {"ghost": "erase", "van-gogh": "erase", "fox": "erase", "robot": "refuse", "mouse": "flag"}
    key = HmacKey(b"0123456789abcdef0123456789abcdef")
    with applied(pipes[0], folder, key, rules, membranes=membranes) as found:
        yield found


def gammas(decision: Decision) -> list[float]:
    return [a.permeability for a in decision.activations]


@given(
    prompts=st.lists(PROMPT.filter(lambda p: "robot" not in p), min_size=1, max_size=3),
    guidance=st.sampled_from([1, 5]),
)
@example(prompts=["ghost fox", "a", "van gogh"], guidance=5)
@settings(max_examples=12, deadline=None)
def test_an_image_changes_exactly_where_a_membrane_opens(
    prompts: list[str], guidance: int, pipes: tuple[Any, Any], guard: Guard
) -> None:
    options: dict[str, Any] = dict(guidance_scale=guidance, steps=2)
    found: Tensor = draw(pipes[0], prompts, **options)
    base: Tensor = draw(pipes[1], prompts, **options)
    opened = [any(gammas(d)) for d in guard.decide(prompts)]
    assert [not torch.equal(a, b) for a, b in zip(found, base, strict=True)] == opened


@given(prompts=st.lists(PROMPT, min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_a_decision_depends_on_its_own_prompt_only(prompts: list[str], guard: Guard) -> None:
    together = guard.decide(prompts)
    for prompt, decision in zip(prompts, together, strict=True):
        (alone,) = guard.decide([prompt])
        assert gammas(alone) == gammas(decision)
        assert (alone.outcome, alone.hits, alone.reason) == (decision.outcome, decision.hits, decision.reason)


@given(prompt=PROMPT)
@settings(max_examples=40, deadline=None)
def test_membranes_open_for_the_names_in_the_prompt_and_no_others(prompt: str, guard: Guard) -> None:
    words = prompt.split()
    van_gogh = ("van", "gogh") in zip(words, words[1:], strict=False)
    (decision,) = guard.decide([prompt])
    named = ["ghost" in words, van_gogh, "fox" in words]
    assert gammas(decision) == [1.0 if name else 0.0 for name in named]
    wanted = "refuse" if "robot" in words else "erase" if any(named) else "flag" if "mouse" in words else "allow"
    assert decision.outcome == wanted


@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=2), noise=NOISE, at=st.integers(0, 40))
@example(words=["gogh", "van"], noise="\u200b", at=1)
@settings(max_examples=60, deadline=None)
def test_invisible_characters_never_soften_a_decision(words: list[str], noise: str, at: int, guard: Guard) -> None:
    plain = " ".join(words)
    at %= len(plain) + 1
    before, after = guard.decide([plain, plain[:at] + noise + plain[at:]])
    assert GRAVITY[after.outcome] >= GRAVITY[before.outcome]


@given(prompt=PROMPT, width=st.booleans())
@example(prompt="gogh van", width=True)
@settings(max_examples=30, deadline=None)
def test_case_and_width_never_soften_a_decision(prompt: str, width: bool, guard: Guard) -> None:
    changed = prompt.upper()
    if width and prompt:  # the first letter, in full width
        changed = chr(ord(prompt[0]) + 0xFEE0) + prompt[1:]
    before, after = guard.decide([prompt, changed])
    assert GRAVITY[after.outcome] >= GRAVITY[before.outcome]
