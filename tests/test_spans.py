"""Where phrases stand in the caller's text, and what was normalised."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safegen.spans import CHANGES, changes, span
from safegen.text import PhraseMatcher, normalise

MATCHER = PhraseMatcher(["ghost", "van gogh", "梵高", "nudité", "नंगा", "누드"])


@pytest.mark.parametrize(
    ("text", "found", "changed"),
    [
        ("a ghost", "ghost", ()),
        ("A GHOST!", "GHOST", ("case",)),
        ("a gh0st", "gh0st", ("digits",)),
        ("the g\u200bhost", "g\u200bhost", ("format-characters",)),
        ("a gho\u0301st", "gho\u0301st", ("accents",)),
        ("a ghöst", "ghöst", ("accents",)),
        ("ｇｈｏｓｔ now", "ｇｈｏｓｔ", ("compatibility-forms",)),
        ("a ghоst", "ghоst", ("look-alikes",)),
        ("g h o s t s", "g h o s t", ("separators",)),
        ("gho-st", "gho-st", ("separators",)),
        ("by Van  Gogh", "Van  Gogh", ("case",)),
        ("by vangogh", "vangogh", ("separators",)),
        ("van_gogh", "van_gogh", ("separators",)),
        ("风格是梵高的画", "梵高", ()),
        ("é, ü: a \u202eGH0\u200bST", "GH0\u200bST", ("format-characters", "case", "digits")),
        ("एक नंगा आदमी", "नंगा", ()),
        ("누드 사진", "누드", ()),
        ("nudite", "nudite", ()),
    ],
)
def test_places_and_changes(text: str, found: str, changed: tuple[str, ...]) -> None:
    match = MATCHER.find(text)[0]  # the plain reading comes first
    start, end = span(text, match)
    assert text[start:end] == found
    assert changes(text, match) == changed


@given(before=st.text(max_size=12), after=st.text(max_size=12))
@example(before="ﬃ ", after="\u0301")
@example(before="\u1100\u1161 ", after="")
def test_a_place_holds_the_phrase_whatever_stands_around_it(before: str, after: str) -> None:
    text = f"{before} ghost {after}"
    for match in MATCHER.find(text):
        start, end = span(text, match)
        assert 0 <= start < end <= len(text)
        assert set(changes(text, match)) <= set(CHANGES)
        if (start, end) != (0, len(text)) and match.phrase == "ghost":
            assert MATCHER.matches(text[start:end]) or "ghost" in normalise(text[start:end])
