"""Phrases found in prompts however they are spelled: normalisation and whole-phrase matching.

A prompt is untrusted text. `normalise` removes what a reader does not see (format characters, full-width forms,
accents, look-alike letters); `PhraseMatcher` then finds whole phrases, also spaced out (`s n o o p y`), split
(`snoo-py`), squeezed (`vangogh`) or with digits for letters (`sn00py`). It finds spellings, not meanings: paraphrases
are the business of the embedding score.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from safegen.errors import UsageError

# Latin letter -> the Cyrillic, Greek and phonetic letters that look like it. Lower-case looks decide, because the map
# runs after case folding. Russian and Greek words are mapped too, which harms nothing: phrases and prompts go through
# the same map.
_LOOKS_LIKE = {
    "a": "аαɑᴀ", "b": "ьβʙ", "c": "сϲᴄ", "d": "ԁᴅđð", "e": "еҽεᴇ", "f": "ꜰ", "g": "ɡɢ", "h": "һнʜħ", "i": "іӏιıɩɪ",
    "j": "јϳȷᴊ", "k": "кκᴋ", "l": "łʟ", "m": "мᴍ", "n": "ηɴ", "o": "оοσөᴏø", "p": "рρᴘ", "q": "ԛ", "r": "гʀ",
    "s": "ѕꜱ", "t": "тτᴛŧ", "u": "υᴜ", "v": "νѵᴠ", "w": "ԝωᴡ", "x": "хχ", "y": "уүγʏ", "z": "ᴢζ",
    "ae": "æ", "oe": "œ", "th": "þ", "'": "’‘ʼ`",
}  # fmt: skip
# The ranges are circled, squared and flag letters, which NFKC leaves alone: a to z.
_LOOKALIKES = {ord(odd): plain for plain, odds in _LOOKS_LIKE.items() for odd in odds} | {
    first + i: chr(97 + i) for first in (0x1F150, 0x1F170, 0x1F1E6) for i in range(26)
}

_INVISIBLE = {"Mn", "Me", "Cf", "Cc"}
_FILLERS = {"\u115f", "\u1160", "\u3164", "\uffa0"}  # Hangul fillers: letters by category, blank on screen
# Marks that spell rather than accent: vowel signs of Indic and South-East Asian scripts, voiced kana. They stay on
# letters of such scripts, and go like accents anywhere else.
_FIRST_SPELLED, _LAST_SPELLED, _VOICED = "\u0900", "\u17ff", "\u3099\u309a"
_ASCII_CONTROLS: dict[int, None] = dict.fromkeys((*range(0x09), *range(0x0E, 0x1C), 0x7F))


def normalise(text: str) -> str:
    """Returns `text` as it is compared: what looks alike becomes alike.

    NFKC, accents and format characters dropped, case folded, look-alike letters made Latin, white space collapsed
    to single spaces and trimmed. Idempotent; any string is accepted.

    Args:
        text: Any text.

    Returns:
        The normalised text, possibly empty.
    """
    if text.isascii():
        return " ".join(text.translate(_ASCII_CONTROLS).casefold().split())
    plain = drop_invisible(unicodedata.normalize("NFKD", text))
    # Folding comes after the first stripping (U+0345 would fold to a letter) and can itself bring marks back.
    plain = drop_invisible(unicodedata.normalize("NFKD", plain.casefold()))
    plain = unicodedata.normalize("NFKC", plain.translate(_LOOKALIKES))
    return " ".join(plain.split())


def drop_invisible(text: str) -> str:
    """Returns `text` without marks, format and control characters; tabs and line ends stay, they are white space."""
    if text.isascii():
        return text.translate(_ASCII_CONTROLS)
    kept: list[str] = []
    for c in text:
        spells = kept and kept[-1] >= _FIRST_SPELLED and (_FIRST_SPELLED <= c <= _LAST_SPELLED or c in _VOICED)
        if c.isspace() or spells or (unicodedata.category(c) not in _INVISIBLE and c not in _FILLERS):
            kept.append(c)
    return "".join(kept)


# Scripts written without spaces, or (Hangul) with endings glued to the word: each character is a word of its own, so
# that a phrase in them matches as a substring. U+30FB, the katakana middle dot, is a separator and stays out.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3041-\u30fa\u30fc-\u318f"
    "\u31f0-\u31ff\u3400-\u9fff\uac00-\ud7ff\U00020000-\U0003ffff"
)
# Vowel signs of the Indic scripts are part of a word, though not letters to `re`.
_VOWEL_SIGNS = "".join(
    chr(code)
    for block in (range(0x0900, 0x0E00), range(0x1B00, 0x1D00), range(0xA800, 0xAC00))
    for code in block
    if unicodedata.category(chr(code)) in ("Mc", "Mn")
)
_TOKEN = re.compile(rf"[{_UNSPACED}]|(?:[^\W\d_{_UNSPACED}]|[{_VOWEL_SIGNS}])+|\d+")

_LEET = str.maketrans("0134578@$!|€", "oleastbaslle")
_LEET_HINT = re.compile(r"[0134578@$!|€]")
_LEET_RUN = re.compile(r"(?:[^\W_]|[@$!|€])+")


def _unleet(text: str) -> str:
    """Returns normalised `text` with digits read as letters, and `i` as `l` because 1 stands for both."""

    def read(run: re.Match[str]) -> str:
        word = run.group()
        body = word.rstrip("!|")  # an exclamation, not a letter
        if len(body) > 1 and body.isdigit():
            return word  # a number
        return body.translate(_LEET) + word[len(body) :]

    return _LEET_RUN.sub(read, text).replace("i", "l")


# What stands between two neighbouring words of a text.
_INSIDE, _TIGHT, _SPACE, _BREAK = range(4)  # inside a word; no white space; white space; the end of a clause
_ALWAYS_BREAKS = frozenset(",;。、")
_BREAKS_BEFORE_SPACE = frozenset(":!?|")
_SPACED_OUT_GAP = 3  # the widest gap between the letters of a spelled-out word
_SPLIT_WORD = 7  # a word this long may also be cut by a space ("pika chu"); shorter ones would meet ordinary words


def _gap_kind(gap: str) -> int:
    marks = set(gap)
    if marks & _ALWAYS_BREAKS:
        return _BREAK
    if " " not in marks:
        return _TIGHT
    return _BREAK if marks & _BREAKS_BEFORE_SPACE else _SPACE


class _Joined:
    """The words of a normalised text written together, and what stood at each place between them."""

    __slots__ = ("edges", "starts", "text")

    def __init__(self, text: str) -> None:
        tokens = list(_TOKEN.finditer(text))
        self.text = "".join(token.group() for token in tokens)
        self.starts: list[int] = []
        self.edges = bytearray(len(self.text) + 3)  # room for a plural after the end
        run = 0  # how many one-character words in a row ended with this one
        offset = previous = 0
        for token in tokens:
            gap = text[previous : token.start()]
            self.edges[offset] = _gap_kind(gap)
            single = token.end() - token.start() == 1
            run = run + 1 if single and (run == 0 or len(gap) <= _SPACED_OUT_GAP) else int(single)
            if run >= 3:  # "s n o": the letters are spelled out, whatever separates them
                self.edges[offset] = self.edges[self.starts[-1]] = _TIGHT
            self.starts.append(offset)
            offset += token.end() - token.start()
            previous = token.end()
        self.edges[offset] = _BREAK
        self.edges[0] = _BREAK


@dataclass(frozen=True, slots=True)
class _Entry:
    """A phrase: its index and letters, where a text may have white space in it, and where the end of a clause."""

    index: int
    letters: str
    boundaries: frozenset[int]
    breaks: frozenset[int]


_Heads = dict[str, list[_Entry]]
"""Phrases by their first letters, up to `_HEAD`; a shorter phrase by all it has."""
_HEAD = 4


@dataclass(frozen=True, slots=True)
class Match:
    """One phrase found in a text.

    Attributes:
        phrase: The phrase as it was given to the matcher.
        reading: How the text was read: as it is, or with digits for letters. Offsets compare within one reading.
        start: Offset of the first character in the text without its separators.
        end: Offset after the last character, plural ending not included.
    """

    phrase: str
    reading: Literal["plain", "leet"]
    start: int
    end: int

    def inside(self, other: Match) -> bool:
        """Tells whether this match lies within another of the same reading."""
        return other.reading == self.reading and other.start <= self.start and self.end <= other.end


class PhraseMatcher:
    """Finds which of many phrases stand in a text, in time linear in the text.

    A phrase matches whole, between word boundaries; its last word may carry a plural or possessive s ("Picassos",
    "Van Gogh's", not "ghostly"). Where the phrase has a boundary the text may have any separator or none; elsewhere
    only one without white space, unless single letters are spelled out or the phrase is long. The end of a clause
    (comma, semicolon, colon and space) separates, unless the phrase has one there too. CJK, Thai and Korean phrases
    match as substrings.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        """Compiles the phrases.

        Args:
            phrases: Any number of phrases, in any spelling; equal ones are kept once.

        Raises:
            UsageError: A phrase has no letter and no digit.
        """
        self.phrases = tuple(dict.fromkeys(phrases))
        self._plain: _Heads = {}
        self._leet: _Heads = {}
        for index, phrase in enumerate(self.phrases):
            text = normalise(phrase)
            _insert(self._plain, text, index, phrase)
            _insert(self._leet, _unleet(text), index, phrase)

    def matches(self, text: str) -> tuple[str, ...]:
        """Returns the phrases that stand in `text`, as given and in the given order, each once."""
        found = {match.phrase for match in self.find(text)}
        return tuple(phrase for phrase in self.phrases if phrase in found) if found else ()

    def find(self, text: str) -> tuple[Match, ...]:
        """Returns every place where a phrase stands in `text`, in reading order; one place per reading."""
        plain = normalise(text)
        found = [Match(self.phrases[i], "plain", start, end) for i, start, end in _scan(self._plain, _Joined(plain))]
        if _LEET_HINT.search(plain):
            joined = _Joined(_unleet(plain))
            found += [Match(self.phrases[i], "leet", start, end) for i, start, end in _scan(self._leet, joined)]
        return tuple(found)


def letters(plain: str, reading: Literal["plain", "leet"]) -> list[int]:
    """Returns where the characters stand that the offsets of a `Match` count.

    Args:
        plain: A normalised text.
        reading: The reading of the match.

    Returns:
        Offsets into `plain`, ascending.
    """
    text = plain if reading == "plain" else _unleet(plain)  # of the same length
    return [offset for token in _TOKEN.finditer(text) for offset in range(*token.span())]


def phrase_matches(phrase: str, text: str) -> bool:
    """Tells whether `phrase` stands in `text`, by the rules of `PhraseMatcher`.

    Raises:
        UsageError: `phrase` has no letter and no digit.
    """
    return bool(PhraseMatcher((phrase,)).find(text))


def _insert(heads: _Heads, text: str, index: int, phrase: str) -> None:
    joined = _Joined(text)
    if not joined.text:
        raise UsageError(f"phrase {phrase!r} has no letter and no digit, so it can match nothing; remove it")
    breaks = frozenset(start for start in joined.starts if joined.edges[start] == _BREAK)
    entry = _Entry(index, joined.text, frozenset(joined.starts), breaks)
    heads.setdefault(joined.text[:_HEAD], []).append(entry)


def _scan(heads: _Heads, joined: _Joined) -> Iterator[tuple[int, int, int]]:
    """Yields `(phrase index, start, end)` for each phrase, looking at each word of the text, shorter phrases first."""
    text, edges = joined.text, joined.edges
    for start in joined.starts:
        found: list[tuple[int, int]] = []
        for size in range(1, min(_HEAD, len(text) - start) + 1):
            for entry in heads.get(text[start : start + size], ()):
                end = start + len(entry.letters)
                if (
                    text.startswith(entry.letters, start)
                    and _ends_word(text, edges, end)
                    and _fits(entry, edges, start)
                ):
                    found.append((end, entry.index))
        yield from ((index, start, end) for end, index in sorted(found))


def _fits(entry: _Entry, edges: bytearray, start: int) -> bool:
    """Tells whether a text has white space and ends of clauses only where a phrase that it spells may have them."""
    size = len(entry.letters)
    inside = edges[start + 1 : start + size]
    if not any(inside):
        return True
    spaces = [k for k, edge in enumerate(inside, 1) if edge == _SPACE]
    breaks = [k for k, edge in enumerate(inside, 1) if edge == _BREAK]
    return entry.breaks.issuperset(breaks) and (size >= _SPLIT_WORD or entry.boundaries.issuperset(spaces))


def _ends_word(text: str, edges: bytearray, end: int) -> bool:
    """Tells whether a word ends at `end`, a plural s or es aside."""
    return bool(
        edges[end]
        or (text.startswith("s", end) and edges[end + 1])
        or (text.startswith("es", end) and not edges[end + 1] and edges[end + 2])
    )
