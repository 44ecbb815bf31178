"""The text encoder's seam: remembers which token ids made which conditioning.

The denoiser sees embeddings; lexical evidence needs the words. Each row that the text encoder returns is remembered by
a fingerprint of its bytes together with its token ids, so that a row that reaches the denoiser later (repeated for
several images, joined with the unconditional rows) can be traced to its text. A row with no known origin stays unknown,
and the policy's `on_unknown` decides.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from safegen.backend.base import Backend

_ROWS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row of conditioning came from.

    Attributes:
        ids: Its token ids.
        text: The caller's own text where the pipeline's `encode_prompt` was seen; None where only the ids are known.
        negative: Whether it was encoded as a negative (or empty unconditional) prompt.
    """

    ids: tuple[int, ...]
    text: str | None = None
    negative: bool = False


def fingerprint(row: Tensor) -> bytes:
    """Returns a digest of one row's bytes, [tokens, width]."""
    values = row.detach().to("cpu").contiguous()
    return hashlib.blake2b(values.flatten().float().numpy().tobytes(), digest_size=16).digest()


_announced: ContextVar[Mapping[tuple[int, ...], Origin] | None] = ContextVar("safegen_prompts", default=None)


class TextSeam:
    """Watches one text encoder."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._encoder: nn.Module = backend.text_encoder
        self._base = self._encoder.forward
        self._had = self._encoder.__dict__.get("forward")
        self._origins: OrderedDict[bytes, Origin] = OrderedDict()

    def attach(self) -> None:
        """Starts to remember."""
        self._encoder.__dict__["forward"] = self

    def detach(self) -> None:
        """Stops; the text encoder is as before."""
        if self._had is None:
            del self._encoder.__dict__["forward"]
        else:
            self._encoder.__dict__["forward"] = self._had

    @property
    def attached(self) -> bool:
        """Whether the text encoder still reports here."""
        return self._encoder.__dict__.get("forward") is self

    def announce(self, prompts: Sequence[str], negatives: Sequence[str]) -> Any:
        """Says which texts are about to be encoded by this thread; returns a token for `end_announcement`.

        A text that is both a prompt and a negative prompt counts as a prompt.
        """
        texts: dict[tuple[int, ...], Origin] = {}
        for group, negative in ((negatives, True), (prompts, False)):
            if group:
                for text, ids in zip(group, self._backend.tokenise(group).tolist(), strict=True):
                    texts[tuple(ids)] = Origin(tuple(ids), text, negative)
        return _announced.set(texts)

    def end_announcement(self, token: Any) -> None:
        """Ends what `announce` began."""
        _announced.reset(token)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the text encoder and remembers its rows."""
        output = self._base(*args, **kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if isinstance(ids, Tensor) and isinstance(states, Tensor):
            self._remember(ids.tolist(), states)
        return output

    def _remember(self, ids: list[list[int]], states: Tensor) -> None:
        announced = _announced.get() or {}
        for row_ids, row in zip(ids, states, strict=True):
            key = tuple(row_ids)
            self._origins[fingerprint(row)] = announced.get(key, Origin(key))
        while len(self._origins) > _ROWS_KEPT:
            self._origins.popitem(last=False)

    def origin(self, key: bytes) -> Origin | None:
        """Returns where a row with this fingerprint came from; None where it is unknown.

        Token ids beyond the base vocabulary (textual inversion) make a row unknown: their words say nothing.
        """
        found = self._origins.get(key)
        if found is not None and max(found.ids) >= self._backend.vocabulary:
            return None
        return replace(found) if found is not None else None
