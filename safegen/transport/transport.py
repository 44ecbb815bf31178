"""The gate: scores and permeability of every membrane for every row of conditioning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safegen.errors import UnsupportedBackendError
from safegen.text import normalise
from safegen.transport.curve import Curve, permeabilities
from safegen.transport.encoding import TextReader
from safegen.transport.scores import change, clip_cosine, direction, largest, lexical, token_overlap
from safegen.transport.sentence import SentenceEncoder

_BATCH = 64
_DIGITS = 6  # as in the audit log, so that what is logged gives the permeability that is logged


@dataclass(frozen=True, slots=True)
class Target:
    """What one membrane's gate looks for.

    Attributes:
        names: The names that the membrane was trained to erase; a graded score is the largest over them.
        curves: The curve of each graded score that opens it.
        lexical: Whether a whole phrase of the concept in the text opens it fully.
        least: Permeability for every prompt, in [0, 1]; 1 is the score `always`.
    """

    names: tuple[str, ...]
    curves: Mapping[str, Curve]
    lexical: bool = True
    least: float = 0.0


Phrases = Callable[[str], Mapping[int, Sequence[str]]]
"""For a text, the whole phrases found in it (aliases, other spellings and languages), by index of the target."""


@dataclass(frozen=True, slots=True)
class Score:
    """The parts of one membrane's score for one row; None where a part was not computed or cannot be known.

    Attributes:
        direction: Cosine of what prompt and concept change in the empty prompt's encoding, in [-1, 1].
        clipcos: Cosine of flattened text encodings, in [-1, 1] (SPM s_cf).
        token: Token overlap, in [0, 1] (SPM s_ct).
        lexical: 1 where a whole phrase of the concept is in the text, else 0.
        semantic: Cosine of sentence encodings, in [-1, 1].
        permeability: γ, in [0, 1], before `on_unknown`.
        words: The words that did it: phrases found, and for the score `paper` the tokens shared with a name.
        known: Whether the row's words are known.
    """

    direction: float | None
    clipcos: float | None
    token: float | None
    lexical: float | None
    semantic: float | None
    permeability: float
    words: tuple[str, ...]
    known: bool

    @property
    def paper(self) -> float | None:
        """The published score, SPM Eq. 11: the larger of cosine and overlap."""
        parts = [part for part in (self.clipcos, self.token) if part is not None]
        return max(parts) if parts else None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a gate reads in some rows.

    Attributes:
        graded: The graded scores that were computed, each [rows, targets].
        parts: The parts of `paper`, `clipcos` and `token`, where it was computed, each [rows, targets].
        lexical: 0 or 1, [rows, targets].
        permeability: γ, [rows, targets].
        phrases: For each row the phrases found, by target.
        shared: For each row and target the tokens shared with a name, where `paper` was computed and opens it.
        known: For each row, whether its words are known.
        finite: For each row, whether all its values are finite; the scores of other rows mean nothing.
    """

    graded: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]
    lexical: Tensor
    permeability: Tensor
    phrases: Sequence[Mapping[int, Sequence[str]]]
    shared: Callable[[int, int], Sequence[str]]
    known: Sequence[bool]
    finite: Sequence[bool]

    def score(self, row: int, target: int) -> Score:
        """Returns the parts of one score."""
        known, finite = self.known[row], self.finite[row]

        def part(values: Mapping[str, Tensor], name: str, *, of_words: bool = False) -> float | None:
            readable = finite and (known or not of_words)
            return round(values[name][row, target].item(), _DIGITS) if name in values and readable else None

        words = dict.fromkeys((*self.phrases[row].get(target, ()), *self.shared(row, target)))
        return Score(
            direction=part(self.graded, "direction"),
            clipcos=part(self.parts, "clipcos"),
            token=part(self.parts, "token", of_words=True),
            lexical=self.lexical[row, target].item() if known else None,
            semantic=part(self.graded, "semantic", of_words=True),
            permeability=round(self.permeability[row, target].item(), _DIGITS),
            words=tuple(words),
            known=known,
        )


@dataclass(frozen=True, slots=True)
class _View:
    """The names of the targets, as one text encoder reads them.

    Attributes:
        empty: E(""), [tokens, width].
        states: [names, tokens, width].
        changes: What each name changes in `empty`, [names, width].
    """

    empty: Tensor
    states: Tensor
    changes: Tensor

    def change(self, part: Tensor) -> Tensor:
        return change(part, self.empty.to(part.device)).cpu()

    def cosine(self, part: Tensor) -> Tensor:
        return clip_cosine(part.cpu(), self.states[:, : part.shape[1]])


class Gate:
    """Reads rows of conditioning for a fixed list of targets."""

    def __init__(
        self,
        reader: TextReader,
        targets: Sequence[Target],
        phrases: Phrases,
        *,
        sentence: SentenceEncoder | None = None,
    ) -> None:
        """Encodes the targets' names.

        Args:
            reader: The host's text side.
            targets: One per membrane.
            phrases: Finds whole phrases in a text.
            sentence: Sentence encoder for the score `semantic`.

        Raises:
            UnsupportedBackendError: The text encoder returns values that are no numbers.
        """
        self._reader = reader
        self._phrases = phrases
        self._sentence = sentence
        self.targets = tuple(targets)
        self._chosen = {score for target in targets for score in target.curves}
        names = [name for target in targets for name in target.names]
        self._owners = torch.tensor([k for k, target in enumerate(targets) for _ in target.names], dtype=torch.long)
        ids = reader.tokenise(["", *names])
        batches = [reader.views(reader.encode(ids[k : k + _BATCH])) for k in range(0, len(ids), _BATCH)]
        views = [torch.cat([part.float().cpu() for part in parts]) for parts in zip(*batches, strict=True)]
        if not all(bool(torch.isfinite(view).all()) for view in views):
            raise UnsupportedBackendError(
                "the text encoder returns NaN or infinity for the names of the concepts, so no prompt can be compared "
                "with them; expected finite numbers: load the pipeline in another number format"
            )
        self._views = [_View(view[0], view[1:], change(view[1:], view[0])) for view in views]
        self._tokens = [frozenset(token for token, _ in reader.words(row)) for row in ids[1:].tolist()]
        self._meanings = sentence.encode(names) if sentence is not None and names else None

    @property
    def window(self) -> int:
        """Token ids that the text encoder reads at once; longer rows of ids are read in chunks of as many."""
        return self._reader.window

    def read(
        self,
        states: Tensor,
        ids: Sequence[Sequence[int] | None],
        *,
        given: Sequence[str | None] | None = None,
        every: bool = False,
    ) -> Reading:
        """Scores rows of conditioning.

        Args:
            states: [rows, tokens, width]; of conditioning longer than the encoder's window each chunk is scored, and
                the largest score counts.
            ids: Token ids of each row (of its chunks one after the other); None where its origin is unknown.
            given: The caller's own text of each row; None where it was not seen. Phrases are looked for in it too,
                because ids keep less than a text: format characters between letters become tokens of their own.
            every: Computes all graded scores, also those that open nothing.

        Returns:
            The scores. For a row of unknown origin γ follows the graded scores alone; what is done with such a row is
            the policy's `on_unknown`. A row with values that are no numbers gets γ 1 and must be refused.
        """
        # Scores are calibrated in float32; a host that draws under autocast would have them computed in its own format.
        with torch.autocast(states.device.type, enabled=False):
            return self._read(states, ids, given or [None] * len(ids), every=every)

    def _read(
        self, states: Tensor, ids: Sequence[Sequence[int] | None], given: Sequence[str | None], *, every: bool
    ) -> Reading:
        finite = torch.isfinite(states.float().sum(dim=1)).all(dim=1).cpu()  # NaN and infinity survive a sum
        sound = states if bool(finite.all()) else torch.where(finite.to(states.device)[:, None, None], states, 0)
        texts = [self._texts(row) for row in ids]
        wanted = {"direction", "paper", *({"semantic"} if self._sentence else ())} if every else self._chosen
        graded: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        if "direction" in wanted:
            graded["direction"] = self._over_chunks(
                sound, lambda part, view: direction(view.change(part), view.changes)
            )
        if "paper" in wanted:
            parts = {
                "clipcos": self._over_chunks(sound, lambda part, view: view.cosine(part)),
                "token": self._overlap(ids, texts),
            }
            graded["paper"] = torch.maximum(parts["clipcos"], parts["token"])
        if "semantic" in wanted:
            graded["semantic"] = self._semantic(texts)
        own = [() if text is None else (text,) for text in given]
        phrases = [self._found(dict.fromkeys((*row, *text))) for row, text in zip(texts, own, strict=True)]
        hits = lexical([[k for k in found if self.targets[k].lexical] for found in phrases], len(self.targets))
        gamma = self._permeability(graded, hits)
        gamma[~finite] = 1.0

        def shared(row: int, target: int) -> Sequence[str]:
            return self._shared(ids[row], target) if "paper" in graded and gamma[row, target] > 0 else ()

        known = [row is not None for row in ids]
        return Reading(graded, parts, hits, gamma, phrases, shared, known, finite.tolist())

    def _over_chunks(self, states: Tensor, score: Callable[[Tensor, _View], Tensor]) -> Tensor:
        """Returns the largest score over the names of each target, over views and chunks, [rows, targets]."""
        chunks: list[Tensor] = []
        for view, part in zip(self._views, self._reader.views(states), strict=True):
            tokens, width = part.shape[1], len(view.empty)
            starts = [*range(0, tokens - width, width), tokens - width] if tokens > width else [0]
            found = (score(part[:, k : k + width], view) for k in starts)
            chunks += [largest(scores, self._owners, len(self.targets)) for scores in found]
        return _rounded(torch.stack(chunks).amax(dim=0))

    def _permeability(self, graded: Mapping[str, Tensor], hits: Tensor) -> Tensor:
        found = [permeabilities(scores, [t.curves.get(name) for t in self.targets]) for name, scores in graded.items()]
        least = torch.tensor([target.least for target in self.targets]).expand(hits.shape)
        return _rounded(torch.stack([hits, least, *found]).amax(dim=0))

    def _chunks(self, ids: Sequence[int]) -> list[Sequence[int]]:
        return [ids[k : k + self.window] for k in range(0, len(ids), self.window)]

    def _texts(self, ids: Sequence[int] | None) -> tuple[str, ...]:
        """Returns the texts that a row may stand for; none where its origin is unknown."""
        if ids is None:
            return ()
        readings = [self._reader.readings(chunk) for chunk in self._chunks(ids)]
        return tuple(dict.fromkeys(" ".join(found[k] for found in readings) for k in (0, -1)))

    def _found(self, texts: Iterable[str]) -> Mapping[int, Sequence[str]]:
        found: dict[int, Sequence[str]] = {}
        for text in texts:
            for target, phrases in self._phrases(text).items():
                found[target] = tuple(dict.fromkeys((*found.get(target, ()), *phrases)))
        return found

    def _overlap(self, ids: Sequence[Sequence[int] | None], texts: Sequence[Sequence[str]]) -> Tensor:
        """Returns the overlap of each row's tokens, and of those that it would have if it were spelled plainly."""
        held: list[set[int]] = []
        for row, readings in zip(ids, texts, strict=True):
            plain = dict.fromkeys(text for reading in readings if (text := normalise(reading)) != reading)
            rows = [*self._chunks(row or ()), *(self._reader.tokenise(list(plain)).tolist() if plain else [])]
            held.append({token for one in rows for token, _ in self._reader.words(one)})
        return _rounded(largest(token_overlap(held, self._tokens), self._owners, len(self.targets)))

    def _shared(self, ids: Sequence[int] | None, target: int) -> Sequence[str]:
        names = [k for k, owner in enumerate(self._owners.tolist()) if owner == target]
        wanted = frozenset[int]().union(*(self._tokens[k] for k in names))
        return [
            text for chunk in self._chunks(ids or ()) for token, text in self._reader.words(chunk) if token in wanted
        ]

    def _semantic(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """Returns the cosine of sentence encodings; -1 where the words are unknown."""
        assert self._sentence is not None
        assert self._meanings is not None
        found = torch.full((len(texts), len(self.targets)), -1.0)
        known = [k for k, readings in enumerate(texts) if readings]
        if known:
            vectors = self._sentence.encode([texts[k][0] for k in known])
            found[known] = largest(vectors @ self._meanings.T, self._owners, len(self.targets))
        return _rounded(found)


def _rounded(values: Tensor) -> Tensor:
    return (values.double() * 10**_DIGITS).round().div(10**_DIGITS)
