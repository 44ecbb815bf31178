"""What the gates need of a host's text side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TextReader(Protocol):
    """Turns texts into what the denoiser reads, and back into words."""

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """Returns token ids [n, tokens], padded and cut as the host does it."""
        ...

    def words(self, ids: Sequence[int]) -> tuple[tuple[int, str], ...]:
        """Returns the real tokens of a row, without begin, end and padding, each with its text."""
        ...

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text that a row of token ids stands for: what the model read, without what was cut off."""
        ...

    def readings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Returns the texts that a row of token ids may stand for, `text_of` first, where ids keep less than a text."""
        ...

    def encode(self, ids: Tensor) -> Tensor:
        """Returns the conditioning [n, tokens, width] of token ids [n, tokens], without gradient."""
        ...
