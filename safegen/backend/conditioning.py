"""The text encoder's seam: remembers which token ids made which conditioning.

The denoiser sees embeddings; lexical evidence needs the words. Each row that the text encoder returns is remembered by
a fingerprint of its bytes together with its token ids, so that a row that reaches the denoiser later (repeated for
several images, joined with the unconditional rows) can be traced to its text. A row with no known origin stays unknown,
and the policy's `on_unknown` decides.

Which row is a negative prompt is not a property of the row: the same words can be a prompt in one call and a negative
prompt in the next, or in another thread at the same time. It is known per call, from what `encode_prompt` returned.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from safegen.backend.base import Backend
from safegen.backend.standin import StandIn

_ROWS_KEPT = 4096

Texts = Mapping[tuple[int, ...], str]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row of conditioning came from.

    Attributes:
        ids: Its token ids.
        text: The caller's own text where the pipeline's `encode_prompt` was seen; None where only the ids are known.
        negative: Whether this call of the pipeline uses it as a negative (or empty unconditional) prompt.
    """

    ids: tuple[int, ...]
    text: str | None = None
    negative: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """What one thread encoded last; told apart by identity.

    Attributes:
        texts: The caller's texts by their token ids.
        prompts: Fingerprints of the rows that `encode_prompt` returned as prompts.
        negatives: Fingerprints of the rows that it returned as negative prompts, and not as prompts too.
    """

    texts: Texts = field(default_factory=dict[tuple[int, ...], str])
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


def _fingerprints(rows: Tensor | None) -> frozenset[bytes]:
    return frozenset(fingerprint(row) for row in rows) if rows is not None else frozenset()


_announced: ContextVar[Texts | None] = ContextVar("safegen_prompts", default=None)
_unseen: ContextVar[bool] = ContextVar("safegen_unseen", default=False)
_last: ContextVar[tuple[object, Encoding] | None] = ContextVar("safegen_encoding", default=None)


class _Reporting(StandIn):
    """Stands in for the `forward` of one text encoder."""

    def __init__(self, seam: TextSeam, encoder: nn.Module) -> None:
        super().__init__(encoder, "forward")
        self._seam = seam

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return self._base(*args, **kwargs)
        return self._seam.encode(self._base, *args, **kwargs)


class TextSeam:
    """Watches one text encoder, and the copies that are made of it while it is watched."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._reporting = _Reporting(self, backend.text_encoder)
        self._prove: Callable[[], None] = lambda: None
        self._origins: OrderedDict[bytes, Origin] = OrderedDict()
        self._window = backend.tokenise([""]).shape[1]

    def attach(self, prove: Callable[[], None]) -> None:
        """Starts to remember.

        Args:
            prove: Called before every encoding that was not announced (a pipeline made with `from_pipe`, the host's own
                code); raises where the guard is not in place, so that nothing is encoded for a denoiser without one.
        """
        self._prove = prove
        self._reporting.attach()

    def detach(self) -> None:
        """Stops; the text encoder is as before. Leaves a stand-in that somebody else has put in place since."""
        self._reporting.detach()

    @property
    def attached(self) -> bool:
        """Whether the text encoder still reports here."""
        return self._reporting.attached

    def announce(self, texts: Sequence[str]) -> Token[Texts | None]:
        """Says which texts are about to be encoded by this thread; returns a token for `end_announcement`."""
        ids = self._backend.tokenise(texts).tolist() if texts else []
        return _announced.set({tuple(row): text for row, text in zip(ids, texts, strict=True)})

    def end_announcement(self, token: Token[Texts | None]) -> None:
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

    def returned(self, prompts: Tensor | None, negatives: Tensor | None) -> None:
        """Takes note of what `encode_prompt` returned, while its texts are announced.

        A row that is both a prompt and a negative prompt counts as a prompt.
        """
        found = _fingerprints(prompts)
        _last.set((self, Encoding(_announced.get() or {}, found, _fingerprints(negatives) - found)))

    def last(self) -> Encoding:
        """Returns what this thread encoded last with this text encoder."""
        seam, encoding = _last.get() or (None, NOTHING)
        return encoding if seam is self else NOTHING

    def encode(self, encoder: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a text encoder and remembers its rows."""
        if _unseen.get():
            return encoder(*args, **kwargs)
        if _announced.get() is None:
            self._prove()
        output = encoder(*args, **kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if isinstance(ids, Tensor) and isinstance(states, Tensor):
            self._remember(ids.tolist(), states)
        if _announced.get() is None:
            _last.set((self, Encoding()))
        return output

    def _remember(self, ids: list[list[int]], states: Tensor) -> None:
        texts = _announced.get() or {}
        for row_ids, row in zip(ids, states, strict=True):
            key, where = tuple(row_ids), fingerprint(row)
            self._origins[where] = Origin(key, texts.get(key))
            self._origins.move_to_end(where)
        while len(self._origins) > _ROWS_KEPT:
            self._origins.popitem(last=False)

    def trace(self, row: Tensor, encoding: Encoding) -> Origin | None:
        """Returns where a row of conditioning came from; None where that is unknown.

        Hosts for long prompts encode them in chunks of the encoder's window and join those: such a row's origin is
        that of all its chunks, one after the other.

        Args:
            row: [tokens, width].
            encoding: What the run that uses it encoded.
        """
        key = fingerprint(row)
        if len(row) <= self._window or len(row) % self._window:
            return self.origin(key, encoding)
        found = [self.origin(fingerprint(chunk), encoding) for chunk in row.split(self._window)]
        if not all(found):
            return None
        return Origin(tuple(i for origin in found if origin for i in origin.ids), None, key in encoding.negatives)

    def origin(self, key: bytes, encoding: Encoding) -> Origin | None:
        """Returns where a row with this fingerprint came from; None where it is unknown.

        Token ids beyond the base vocabulary (textual inversion) make a row unknown: their words say nothing.

        Args:
            key: The row's fingerprint.
            encoding: What the run that uses it encoded.
        """
        found = self._origins.get(key)
        if found is None or max(found.ids) >= self._backend.vocabulary:
            return None
        return Origin(found.ids, encoding.texts.get(found.ids, found.text), key in encoding.negatives)
