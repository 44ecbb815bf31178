"""The gate: permeability of every membrane for every row of conditioning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safegen.text import normalise
from safegen.transport.encoding import TextReader
from safegen.transport.scores import clip_cosine, shared_tokens, token_overlap


@dataclass(frozen=True, slots=True)
class Target:
    """What one membrane's gate looks for.

    Attributes:
        names: The names that the membrane was trained to erase; the paper's score is the largest over them.
        floor: Score below which the membrane stays exactly shut, in (0, 1].
    """

    names: tuple[str, ...]
    floor: float


Phrases = Callable[[str], Sequence[Sequence[str]]]
"""For a text, the whole phrases found in it, one list per target (aliases, other spellings and languages)."""


@dataclass(frozen=True, slots=True)
class Score:
    """The parts of one membrane's score for one row, and what follows.

    Attributes:
        clipcos: Cosine of text encodings, in [-1, 1] (SPM s_cf); the largest over the target's names.
        token: Token overlap, in [0, 1] (SPM s_ct); the largest over the target's names; None where the words are
            unknown.
        lexical: 1 where a whole phrase of the concept is in the text, else 0; None where the words are unknown.
        permeability: γ, in [0, 1]; exactly 0 below the floor.
        words: The words that did it: tokens shared with a name, and phrases found.
        known: Whether the row's words are known.
    """

    clipcos: float
    token: float | None
    lexical: float | None
    permeability: float
    words: tuple[str, ...]
    known: bool


def curve(score: float, floor: float) -> float:
    """Permeability of a score: the score itself as in SPM Eq. 11, but exactly 0 below the floor.

    Args:
        score: In [-1, 1].
        floor: In (0, 1].

    Returns:
        In [0, 1].
    """
    return min(score, 1.0) if score >= floor else 0.0


class Gate:
    """Reads rows of conditioning for a fixed list of targets."""

    def __init__(self, reader: TextReader, targets: Sequence[Target], phrases: Phrases) -> None:
        """Encodes the targets' names.

        Args:
            reader: The host's text side.
            targets: One per membrane.
            phrases: Finds whole phrases in a text.
        """
        self._reader = reader
        self._phrases = phrases
        self.targets = tuple(targets)
        self._names = [(k, name) for k, target in enumerate(targets) for name in target.names]
        ids = reader.tokenise([name for _, name in self._names]) if self._names else torch.empty(0, 1)
        self._tokens = [frozenset(token for token, _ in reader.words(row)) for row in ids.tolist()]
        self._states = reader.encode(ids).float().cpu() if self._names else torch.empty(0, 1, 1)

    def read(self, states: Tensor, ids: Sequence[Sequence[int] | None]) -> list[list[Score]]:
        """Scores rows of conditioning.

        Args:
            states: [rows, tokens, width].
            ids: Token ids of each row; None where its origin is unknown.

        Returns:
            One score per row and target. For a row of unknown origin `permeability` follows the cosine alone; what is
            done with such a row is the policy's `on_unknown`.
        """
        if not self.targets:
            return [[] for _ in ids]
        # A cosine that is not a number (broken conditioning) counts as full likeness: the gate fails open, never shut.
        cosines = clip_cosine(states.cpu(), self._states).nan_to_num(nan=1.0).tolist()
        return [self._row(cosine, row) for cosine, row in zip(cosines, ids, strict=True)]

    def _row(self, cosine: Sequence[float], ids: Sequence[int] | None) -> list[Score]:
        best = [-1.0] * len(self.targets)
        overlap = [0.0] * len(self.targets)
        shared: list[tuple[str, ...]] = [()] * len(self.targets)
        readings = self._reader.readings(ids) if ids is not None else ()
        words = self._words(ids, readings) if ids is not None else ()
        tokens = {token for token, _ in words}
        for (k, _), value, wanted in zip(self._names, cosine, self._tokens, strict=True):
            best[k] = max(best[k], value)
            found = token_overlap(tokens, wanted)
            if found > overlap[k]:
                overlap[k], shared[k] = found, shared_tokens(words, wanted)
        if ids is None:
            return [
                Score(value, None, None, curve(value, target.floor), (), known=False)
                for value, target in zip(best, self.targets, strict=True)
            ]
        found_in = [self._phrases(text) for text in readings]
        phrases = [[phrase for found in found_in for phrase in found[k]] for k in range(len(best))]
        return [self._known(k, best[k], overlap[k], shared[k], phrases[k]) for k in range(len(best))]

    def _words(self, ids: Sequence[int], readings: Sequence[str]) -> tuple[tuple[int, str], ...]:
        """Returns a row's tokens, and those that it would have if it were spelled plainly."""
        plain = dict.fromkeys(text for reading in readings if (text := normalise(reading)) != reading)
        rows = self._reader.tokenise(list(plain)).tolist() if plain else []
        return tuple(word for row in (ids, *rows) for word in self._reader.words(row))

    def _known(self, k: int, cosine: float, overlap: float, shared: Sequence[str], phrases: Sequence[str]) -> Score:
        floor = self.targets[k].floor
        lexical = 1.0 if phrases else 0.0
        gamma = curve(max(cosine, overlap, lexical), floor)
        words = tuple(dict.fromkeys((*(shared if overlap >= floor else ()), *phrases)))
        return Score(cosine, overlap, lexical, gamma, words, known=True)
