"""Spelling a prompt otherwise never lowers its lexical score; a prompt and its own embeddings open alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import WORDS, install, policy_file, random_membrane, tiny_sd

from safegen.backend.conditioning import Origin
from safegen.gatekeeper import Gatekeeper
from safegen.guard import prepare

CONCEPTS = ("ghost", "van-gogh", "santa-claus")
PROMPT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
FORMAT = "\u200b\u200c\u200d\u00ad\u2060\ufeff\u202e\u061c"
ACCENTS = "\u0300\u0301\u0308\u0336\u034f"


@pytest.fixture(scope="module")
def gatekeeper(tmp_path_factory: pytest.TempPathFactory) -> Gatekeeper:
    folder: Path = tmp_path_factory.mktemp("lexical")
    pipe: Any = tiny_sd(tokens=77)  # so that no noise pushes a name behind the last token
    root = install(folder, *(random_membrane(pipe, concept, floor=-0.5) for concept in CONCEPTS))
    _, _, found = prepare(pipe, policy_file(folder, dict.fromkeys(CONCEPTS, "erase")), membranes=[root])
    return found


def lexical(gatekeeper: Gatekeeper, *texts: str) -> list[list[float]]:
    return [[a.score.lexical or 0.0 for a in d.activations] for d in gatekeeper.decide_texts(texts)]


def changed(text: str, kind: str, places: list[int], mark: int) -> str:
    """Returns a text with its spelling changed at some places."""
    letters = list(text)
    for place in places:
        k = place % len(letters)
        if kind == "format characters":
            letters[k] += FORMAT[mark % len(FORMAT)]
        elif kind == "accents" and letters[k] != " ":
            letters[k] += ACCENTS[mark % len(ACCENTS)]
        elif kind == "full width" and "!" <= letters[k] <= "~":
            letters[k] = chr(ord(letters[k]) + 0xFEE0)
        elif kind == "case":
            letters[k] = letters[k].swapcase()
    return "".join(letters)


@given(
    prompt=PROMPT,
    kind=st.sampled_from(["format characters", "accents", "full width", "case"]),
    places=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    mark=st.integers(0, 7),
)
@example(prompt="a ghost", kind="format characters", places=[0, 2], mark=0)
@example(prompt="santa claus", kind="accents", places=[0, 5, 7], mark=3)
@example(prompt="van gogh", kind="full width", places=[0, 1, 2, 4], mark=0)
@settings(max_examples=80, deadline=None)
def test_another_spelling_never_lowers_the_lexical_score(
    prompt: str, kind: str, places: list[int], mark: int, gatekeeper: Gatekeeper
) -> None:
    before, after = lexical(gatekeeper, prompt, changed(prompt, kind, places, mark))
    assert all(b <= a for b, a in zip(before, after, strict=True))


@given(prompt=st.text(max_size=20) | PROMPT)
@settings(max_examples=60, deadline=None)
def test_a_prompt_and_its_own_embeddings_open_alike(prompt: str, gatekeeper: Gatekeeper) -> None:
    backend = gatekeeper.backend
    ids = backend.tokenise([prompt])
    states, row = backend.encode(ids), tuple(ids[0].tolist())
    with_text, without = (gatekeeper.decide(states, [Origin(row, text)])[0] for text in (prompt, None))
    gammas = [[a.permeability for a in decision.activations] for decision in (with_text, without)]
    assert gammas[0] == gammas[1]
    assert all(0 <= gamma <= 1 for gamma in gammas[0])
