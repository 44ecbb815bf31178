"""Normalisation and phrase matching: what counts as the same spelling, and what does not."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safegen.errors import UsageError
from safegen.text import PhraseMatcher, normalise, phrase_matches

FOUND = [
    # boundaries, plurals, possessives
    ("van gogh", "A field by Vincent VAN GOGH, oil"),
    ("van gogh", "van gogh's sunflowers"),
    ("van gogh", "two Van Goghs"),
    ("ghost", "three ghosts"),
    ("torch", "two torches"),
    ("batman", "batman2"),
    # separators added, removed, exchanged
    ("snoopy", "s n o o p y"),
    ("snoopy", "draw a s.n.o.o.p.y, please"),
    ("snoopy", "snoo-py"),
    ("snoopy", "snoopy_dog"),
    ("van gogh", "vangogh style"),
    ("van gogh", "v a n g o g h"),
    ("spider-man", "spiderman"),
    ("spider-man", "spider man"),
    ("pikachu", "pika chu"),
    ("c-3po", "C3PO"),
    ("Avatar: The Last Airbender", "avatar: the last airbender"),
    # digits and signs for letters
    ("snoopy", "sn00py!"),
    ("snoopy", "s n 0 0 p y"),
    ("picasso", "p1ca$$o"),
    ("naked", "n@ked"),
    # look-alikes, invisible characters, forms
    ("snoopy", "ѕnооpу"),
    ("snoopy", "ⓢⓝⓞⓞⓟⓨ"),
    ("snoopy", "🅢🅝🅞🅞🅟🅨"),
    ("snoopy", "sno\u200bo\u00adpy"),
    ("van gogh", "ｖａｎ　ｇｏｇｈ"),
    ("van gogh", "vàn gö\u0301gh"),
    ("van gogh", "va\u0941n go\u3099gh"),
    ("velazquez", "Velázquez"),
    # other scripts
    ("梵高", "一幅梵高的画"),
    ("ゴッホ", "ｺﾞｯﾎ風の絵"),
    ("ミッキーマウス", "ミッキー・マウスと"),
    ("고흐", "고흐의 그림"),
    ("สนูปปี้", "ภาพสนูปปี้"),
    ("नंगा", "एक नंगा आदमी"),
    ("ван гога", "в стиле Ван Гога"),
]

NOT_FOUND = [
    ("van gogh", "a white delivery van"),
    ("van", "a caravan"),
    ("ghost", "a ghostly forest"),
    ("mouse", "a mousetrap"),
    ("batman", "a bat, man and ball"),
    ("batman", "a baseball bat man"),
    ("iron man", "on the board: iron, man, tree"),
    ("catwoman", "cat,woman,sofa"),
    ("ゴッホ", "コッホ雪片"),
    ("नंगा", "नगा आदमी"),
    ("tom and jerry", "tom and his dog"),
    ("snoopy", ""),
]


@pytest.mark.parametrize(("phrase", "text"), FOUND)
def test_finds(phrase: str, text: str) -> None:
    assert phrase_matches(phrase, text)


@pytest.mark.parametrize(("phrase", "text"), NOT_FOUND)
def test_does_not_find(phrase: str, text: str) -> None:
    assert not phrase_matches(phrase, text)


def test_matches_returns_given_phrases_in_given_order() -> None:
    matcher = PhraseMatcher(("Van Gogh", "Monet", "Picasso", "Monet"))
    assert matcher.phrases == ("Van Gogh", "Monet", "Picasso")
    assert matcher.matches("picasso and MONET and picasso") == ("Monet", "Picasso")
    assert matcher.matches("a tree") == ()


def test_find_gives_places_without_separators() -> None:
    match, nested = sorted(PhraseMatcher(("nude lipstick", "nude")).find("a nude lipstick"), key=lambda m: -m.end)
    assert (match.phrase, match.reading, match.start, match.end) == ("nude lipstick", "plain", 1, 13)
    assert (nested.start, nested.end) == (1, 5)


def test_a_phrase_without_letters_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'!\?' has no letter"):
        PhraseMatcher(("!?",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A\tB\nC  ", "a b c"),
        ("ＶＡＮ", "van"),
        ("Ångström ﬁ ß Łódź", "angstrom fi ss lodz"),
        ("СССР", "cccp"),
        ("a\u200d\u0000\ufeffb", "ab"),
        ("\u1e9e\u0345", "ss"),
        ("ドラえもん", "ドラえもん"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


PHRASES = ("van gogh", "snoopy", "mickey mouse", "r2-d2", "the starry night", "101 dalmatians")
ACCENTS = [chr(code) for code in range(0x0300, 0x0370)]
FORMATS = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Cf"]
WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}


@settings(deadline=None)
@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@settings(deadline=None)
@given(st.sampled_from(PHRASES), st.data())
def test_added_marks_never_hide_a_phrase(phrase: str, data: st.DataObject) -> None:
    text = f"a picture of {phrase} on a wall"
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(1, len(text)))
        text = text[:place] + data.draw(st.sampled_from(ACCENTS + FORMATS)) + text[place:]
    for form in ("NFC", "NFKD"):
        assert phrase_matches(phrase, unicodedata.normalize(form, text))


@settings(deadline=None)
@given(st.sampled_from(PHRASES), st.sets(st.integers(0, 30)))
def test_full_width_letters_never_hide_a_phrase(phrase: str, places: set[int]) -> None:
    text = f"by {phrase}, oil"
    assert phrase_matches(phrase, "".join(c.translate(WIDE) if i in places else c for i, c in enumerate(text)))


@settings(deadline=None)
@given(st.sampled_from(PHRASES), st.lists(st.booleans(), min_size=32, max_size=32))
def test_case_never_matters(phrase: str, upper: list[bool]) -> None:
    text = f"one {phrase} there"
    mixed = "".join(c.upper() if up else c for c, up in zip(text, upper, strict=False))
    assert phrase_matches(phrase, mixed)
    assert phrase_matches(mixed, f"so {mixed.swapcase()} it is")


@settings(deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_every_phrase_finds_itself(phrase: str) -> None:
    if any(c.isalnum() for c in normalise(phrase)):
        assert phrase_matches(phrase, phrase)


@settings(deadline=None)
@given(st.text(max_size=60), st.lists(st.text(alphabet="abi1 -,", min_size=1, max_size=6)))
def test_any_text_can_be_searched(text: str, phrases: list[str]) -> None:
    usable = [phrase for phrase in phrases if any(c.isalnum() for c in phrase)]
    assert set(PhraseMatcher(usable).matches(text)) <= set(usable)
