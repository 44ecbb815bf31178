"""What the gates need of a host's text side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text.

    Attributes:
        id: Its id.
        start: Offset of its first character in the text, in code points.
        end: Offset after its last character.
    """

    id: int
    start: int
    end: int


class TextReader(Protocol):
    """Turns texts into what the denoiser reads, and back into words."""

    @property
    def fingerprint(self) -> str:
        """Digest of the tokenizer's vocabulary and the text encoder's weights; scores of others are not comparable."""
        ...

    @property
    def window(self) -> int:
        """Token ids that the encoder reads at once; hosts for long prompts join what it makes of several windows."""
        ...

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """Returns token ids [n, tokens], padded and cut as the host does it."""
        ...

    def tokens(self, text: str) -> tuple[Token, ...]:
        """Returns all real tokens of a text with their places in it, also those that `tokenise` cuts off."""
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

    def views(self, states: Tensor) -> tuple[Tensor, ...]:
        """Returns what is scored of conditioning [n, tokens, width]: one [n, tokens, width] per text encoder.

        Each is scored by itself, and the largest score counts: a concept that one of two encoders reads is read.
        """
        ...


@torch.no_grad()
def weights_digest(model: nn.Module, vocabulary: str) -> str:
    """Returns a digest of a model's weights together with that of its vocabulary, `sha256:<hex>`.

    Weights are taken in half precision, so that one checkpoint loaded in float32 and in float16 is one encoder.

    Args:
        model: The encoder.
        vocabulary: Digest of the tokenizer's vocabulary.
    """
    digest = hashlib.sha256(vocabulary.encode())
    for name, value in sorted(model.named_parameters()):
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
