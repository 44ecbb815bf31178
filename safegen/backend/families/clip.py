"""What the families with CLIP text encoders share: several of them side by side, read by one vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safegen.backend.words import ClipWords, Words
from safegen.errors import UnsupportedBackendError


def clip_readers(pipe: Any, names: Sequence[str]) -> dict[str, Words]:
    """Returns the words of CLIP text encoders.

    Args:
        pipe: The pipeline.
        names: Its text encoders ("text_encoder_2" goes with "tokenizer_2").

    Raises:
        UnsupportedBackendError: Their tokenizers have different vocabularies.
    """
    readers: dict[str, Words] = {}
    for name in names:
        tokenizer: Any = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        readers[name] = ClipWords(tokenizer, size=int(getattr(pipe, name).config.vocab_size))
    digests = {reader.digest for reader in readers.values()}
    if len(digests) > 1:
        raise UnsupportedBackendError(
            f"the tokenizers of {', '.join(names)} have different vocabularies; expected CLIP's own for all of "
            "them, as in the published models of this family"
        )
    return readers


def penultimate(output: Any) -> tuple[Tensor, Tensor]:
    """Returns what SDXL and SD3 take of a CLIP text encoder: hidden states [n, tokens, width], pooled [n, 1, width]."""
    return output.hidden_states[-2], output[0][:, None]


def packed(states: Tensor, *pooled: Tensor) -> Tensor:
    """Appends pooled vectors to conditioning as further tokens, filled up with 0.

    Args:
        states: [rows, tokens, width].
        pooled: Each [rows, at most width].
    """
    width = states.shape[-1]
    rows = [torch.nn.functional.pad(one, (0, width - one.shape[-1]))[:, None] for one in pooled]
    return torch.cat([states, *rows], dim=1)
