"""The text encoders' seam: remembers which token ids made which conditioning.

The denoiser sees embeddings; lexical evidence needs the words. Each row that the text encoder returns is remembered by
a fingerprint of its bytes together with its token ids, so that a row that reaches the denoiser later (repeated for
several images, joined with the unconditional rows) can be traced to its text. Where several text encoders feed one
denoiser, a row is known when what it holds of each of them is. A row with no known origin stays unknown, and the
policy's `on_unknown` decides.

Which row is a negative prompt is not a property of the row: the same words can be a prompt in one call and a negative
prompt in the next, or in another thread at the same time. It is known per call, from what `encode_prompt` returned.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from safegen.backend.base import Backend, Strand
from safegen.backend.standin import StandIn

_ROWS_KEPT = 4096

Texts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row of conditioning came from.

    Attributes:
        ids: Token ids of the encoder that the gate reads.
        text: The caller's own text where the pipeline's `encode_prompt` was seen; None where only the ids are known.
        negative: Whether this call of the pipeline uses it as a negative (or empty unconditional) prompt.
        others: Further texts that the row holds: what its other encoders read, where that is another text or more.
    """

    ids: tuple[int, ...]
    text: str | None = None
    negative: bool = False
    others: Texts = ()


NOTHING_SAID = Origin((), "", negative=True)
"""The origin of a row that is all 0: hosts zero unconditional rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """What one thread encoded last; told apart by identity.

    Attributes:
        texts: The caller's texts by the key of their row.
        prompts: Keys of the rows that `encode_prompt` returned as prompts.
        negatives: Keys of the rows that it returned as negative prompts, and not as prompts too.
    """

    texts: Mapping[bytes, Texts] = field(default_factory=dict[bytes, Texts])
    prompts: frozenset[bytes] = frozenset()
    negatives: frozenset[bytes] = frozenset()

    def following(self, previous: Encoding) -> Encoding:
        """Returns what holds once this was encoded in the middle of a run that began with `previous`."""
        if not self.prompts:
            return self  # encoded by hand: which rows are negative is no longer known
        return Encoding(
            {**previous.texts, **self.texts}, self.prompts, (previous.negatives | self.negatives) - self.prompts
        )


NOTHING = Encoding()


def fingerprint(row: Tensor) -> bytes:
    """Returns a digest of one row's bytes, [tokens, width]."""
    values = row.detach().to("cpu").contiguous()
    return hashlib.blake2b(values.flatten().float().numpy().tobytes(), digest_size=16).digest()


def _real(row: Tensor) -> Tensor:
    """Returns a row without the tokens that are all 0: hosts pad with them, and set to them what is masked."""
    return row[row.ne(0).any(dim=-1)]


def _key(prints: Sequence[bytes]) -> bytes:
    """Returns the key of a row from the fingerprints of its strands."""
    return prints[0] if len(prints) == 1 else hashlib.blake2b(b"".join(prints), digest_size=16).digest()


def _keys(strands: Sequence[Strand]) -> list[bytes]:
    if not strands:
        return []
    prints = [[fingerprint(_real(row)) for row in strand.rows] for strand in strands]
    return [_key(row) for row in zip(*prints, strict=True)]


@dataclass(frozen=True, slots=True)
class _Said:
    """Which texts are about to be encoded."""

    prompts: Sequence[Sequence[str]] = ()
    negatives: Sequence[Sequence[str]] = ()


_announced: ContextVar[_Said | None] = ContextVar("safegen_prompts", default=None)
_unseen: ContextVar[bool] = ContextVar("safegen_unseen", default=False)
_last: ContextVar[tuple[object, Encoding] | None] = ContextVar("safegen_encoding", default=None)


class _Reporting(StandIn):
    """Stands in for the `forward` of one text encoder."""

    def __init__(self, seam: TextSeam, name: str, encoder: nn.Module) -> None:
        super().__init__(encoder, "forward")
        self._seam, self._encoder = seam, name
        self._arguments = tuple(inspect.signature(type(encoder).forward).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return self._base(*args, **kwargs)
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        return self._seam.encode(self._encoder, given, lambda: self._base(*args, **kwargs))


class TextSeam:
    """Watches the text encoders of one pipeline, and the copies that are made of them while they are watched."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._reporting = [_Reporting(self, name, encoder) for name, encoder in backend.text_encoders.items()]
        self._prove: Callable[[], None] = lambda: None
        self._origins: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._texts: OrderedDict[bytes, Texts] = OrderedDict()
        self._window = backend.window

    def attach(self, prove: Callable[[], None]) -> None:
        """Starts to remember.

        Args:
            prove: Called before every encoding that was not announced (a pipeline made with `from_pipe`, the host's own
                code); raises where the guard is not in place, so that nothing is encoded for a denoiser without one.
        """
        self._prove = prove
        for reporting in self._reporting:
            reporting.attach()

    def detach(self) -> None:
        """Stops; the text encoders are as before. Leaves a stand-in that somebody else has put in place since."""
        for reporting in self._reporting:
            reporting.detach()

    @property
    def attached(self) -> bool:
        """Whether the text encoders still report here."""
        return all(reporting.attached for reporting in self._reporting)

    def announce(
        self, prompts: Sequence[Sequence[str]], negatives: Sequence[Sequence[str]] = ()
    ) -> Token[_Said | None]:
        """Says which texts are about to be encoded by this thread; returns a token for `end_announcement`.

        Args:
            prompts: For each prompt its texts: the first for the encoder that the gate reads, more where the caller
                gives other encoders other texts.
            negatives: The negative prompts, likewise.
        """
        return _announced.set(_Said(prompts, negatives))

    def end_announcement(self, token: Token[_Said | None]) -> None:
        """Ends what `announce` began."""
        _announced.reset(token)

    @contextmanager
    def unseen(self) -> Generator[None]:
        """Lets this thread encode without anything being remembered: for safegen's own questions during a run."""
        token = _unseen.set(True)
        try:
            yield
        finally:
            _unseen.reset(token)

    def returned(self, prompts: Sequence[Strand], negatives: Sequence[Strand]) -> None:
        """Takes note of what `encode_prompt` returned, while its texts are announced.

        A row that is both a prompt and a negative prompt counts as a prompt.
        """
        said = _announced.get() or _Said()
        wanted, unwanted = _keys(prompts), _keys(negatives)
        texts = {**_paired(unwanted, said.negatives), **_paired(wanted, said.prompts)}
        for key, found in texts.items():
            _keep(self._texts, key, found)
        _last.set((self, Encoding(texts, frozenset(wanted), frozenset(unwanted) - frozenset(wanted))))

    def last(self) -> Encoding:
        """Returns what this thread encoded last with these text encoders."""
        seam, encoding = _last.get() or (None, NOTHING)
        return encoding if seam is self else NOTHING

    def encode(self, name: str, given: Mapping[str, Any], encoder: Callable[[], Any]) -> Any:
        """Runs a text encoder and remembers its rows.

        Args:
            name: Which one.
            given: Its arguments by name.
            encoder: Runs it.
        """
        if _unseen.get():
            return encoder()
        if _announced.get() is None:
            self._prove()
        output = encoder()
        ids = given.get("input_ids")
        if isinstance(ids, Tensor):
            rows = [tuple(row) for row in ids.tolist()]
            for states in self._backend.made(name, given, output):
                for row_ids, row in zip(rows, states, strict=True):
                    _keep(self._origins, fingerprint(_real(row)), row_ids)
        if _announced.get() is None:
            _last.set((self, Encoding()))
        return output

    def trace(self, row: Sequence[tuple[str, Tensor]], encoding: Encoding) -> Origin | None:
        """Returns where a row of conditioning came from; None where that is unknown.

        Hosts for long prompts encode them in chunks of the encoder's window and join those: such a row's origin is
        that of all its chunks, one after the other.

        Args:
            row: What it holds of each text encoder: the encoder's name, and [tokens, width].
            encoding: What the run that uses it encoded.
        """
        held = [(name, _real(part)) for name, part in row]
        prints = [fingerprint(part) for _, part in held]
        found: dict[str, list[tuple[int, ...]]] = {}
        for (name, part), place in zip(held, prints, strict=True):
            if not len(part):
                continue  # all 0
            ids = self._ids(name, part, place)
            if ids is None:
                return None
            found.setdefault(name, []).append(ids)
        return self._origin(found, _key(prints), encoding)

    def _ids(self, name: str, part: Tensor, place: bytes) -> tuple[int, ...] | None:
        """Returns the ids of what a text encoder made; None for what none made, or for ids without a known meaning.

        Token ids beyond the base vocabulary (textual inversion) make a row unknown: their words say nothing.
        """
        whole = self._origins.get(place)
        chunks = [whole]
        if whole is None and len(part) > self._window and len(part) % self._window == 0:
            chunks = [self._origins.get(fingerprint(chunk)) for chunk in part.split(self._window)]
        known = [ids for ids in chunks if ids is not None and self._backend.known(name, ids)]
        return tuple(i for ids in known for i in ids) if len(known) == len(chunks) else None

    def _origin(self, found: Mapping[str, Sequence[tuple[int, ...]]], key: bytes, encoding: Encoding) -> Origin | None:
        """Puts an origin together from the ids that each text encoder was given."""
        negative = key in encoding.negatives
        first = next(iter(self._backend.text_encoders))
        if not found:
            return NOTHING_SAID
        own = dict.fromkeys(found.get(first, [()]))
        said = encoding.texts.get(key) or self._texts.get(key) or ()
        ids = next(iter(own))
        text = said[0] if said and self._backend.wrote(said[0], ids) else None
        read = text if text is not None else self._backend.text_of(ids)
        others = [
            *(said if text is None else said[1:]),
            *(self._backend.text_of(more) for more in list(own)[1:]),
            *(self._backend.spelled(name, ids) for name, rows in found.items() if name != first for ids in rows),
        ]
        further = {_plain(other): other for other in others if _plain(other) != _plain(read)}
        return Origin(ids, text, negative, tuple(further.values()))


def _plain(text: str) -> str:
    """Returns a text as it is compared across tokenizers, which keep case and white space differently."""
    return "".join(text.casefold().split())


def _paired(keys: Sequence[bytes], texts: Sequence[Sequence[str]]) -> dict[bytes, Texts]:
    """Returns the texts of each row: hosts return the rows of one prompt, repeated for its images, one by one."""
    if not texts or len(keys) % len(texts):
        return {}
    images = len(keys) // len(texts)
    return {key: tuple(texts[k // images]) for k, key in enumerate(keys)}


def _keep(kept: OrderedDict[bytes, Any], key: bytes, value: object) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _ROWS_KEPT:
        kept.popitem(last=False)
