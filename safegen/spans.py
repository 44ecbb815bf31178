"""Where a phrase that was found stands in the caller's own text, and what had to be normalised to find it.

`safegen.text` matches on a normalised copy and counts letters only; people and audit records need positions in the
text as it was written.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from safegen.text import Match, drop_invisible, letters, normalise

CHANGES = ("format-characters", "accents", "compatibility-forms", "case", "look-alikes", "digits", "separators")
"""What `changes` can name, in the order in which it does."""


def span(text: str, match: Match) -> tuple[int, int]:
    """Returns where a match stands in the text it was found in.

    Args:
        text: The text, as it was given to the matcher.
        match: What the matcher found there.

    Returns:
        Offsets of the first character and after the last one, in code points of `text`; the whole text where its
        characters cannot be told apart once normalised (rare compositions across letters).
    """
    plain = normalise(text)
    places = _places(text, plain)
    if places is None:
        return 0, len(text)
    counted = letters(plain, match.reading)
    order = {offset: k for k, offset in enumerate(k for k, c in enumerate(plain) if c != " ")}
    return places[order[counted[match.start]]][0], places[order[counted[match.end - 1]]][1]


def _places(text: str, plain: str) -> list[tuple[int, int]] | None:
    """Returns, for each character of normalised `plain` that is no space, where it comes from in `text`."""
    starts = [k for k, c in enumerate(text) if k == 0 or not _joins(c)]
    places: list[tuple[int, int]] = []
    found: list[str] = []
    for start, end in pairwise([*starts, len(text)]):
        part = normalise(text[start:end]).replace(" ", "")
        found.append(part)
        places += [(start, end)] * len(part)
    return places if "".join(found) == plain.replace(" ", "") else None


def _joins(c: str) -> bool:
    """Tells whether a character belongs to the one before it: a mark, a format character, a Hangul vowel or final."""
    return not c.isascii() and (unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") or "\u1160" <= c <= "\u11ff")


def changes(text: str, match: Match) -> tuple[str, ...]:
    """Says what had to be normalised before a phrase could be found.

    Args:
        text: The text, as it was given to the matcher.
        match: What the matcher found there.

    Returns:
        Names out of `CHANGES`, in that order: format characters dropped, accents dropped, compatibility forms (full
        width, ligatures) resolved, case folded, look-alike letters made Latin, digits or marks read as letters, and
        separators that the phrase has not. Empty where the phrase stands in the text as it is.
    """
    start, end = span(text, match)
    found = text[start:end]
    bare = "".join(c for c in found if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())
    composed = unicodedata.normalize("NFC", bare)
    wide = unicodedata.normalize("NFKC", composed)
    unmarked = unicodedata.normalize("NFC", drop_invisible(unicodedata.normalize("NFKD", wide)))
    steps = (
        bare != found,
        unmarked != wide,
        wide != composed,
        unmarked.casefold() != unmarked,
        normalise(unmarked) != " ".join(unmarked.casefold().split()),
        match.reading == "leet",
        _separators(normalise(found)) != _separators(normalise(match.phrase)),
    )
    return tuple(name for name, changed in zip(CHANGES, steps, strict=True) if changed)


def _separators(plain: str) -> Sequence[str]:
    """Returns what stands between the words of a normalised text."""
    return [c for c in plain if not c.isalnum()]
