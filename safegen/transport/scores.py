"""Published transport scores, one pure function each."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def clip_cosine(prompts: Tensor, concepts: Tensor) -> Tensor:
    """Cosine of text encodings, `s_cf` of SPM (arXiv 2312.16145, §3.3).

    As the reference code computes it: over the flattened last hidden state, begin, end and padding positions included.
    Unrelated prompts do not reach 0, and short prompts look alike, which is why a floor belongs to it.

    Args:
        prompts: [rows, tokens, width].
        concepts: [concepts, tokens, width].

    Returns:
        [rows, concepts], in [-1, 1].
    """
    p = torch.nn.functional.normalize(prompts.float().flatten(1), dim=1)
    c = torch.nn.functional.normalize(concepts.float().flatten(1), dim=1)
    return p @ c.T


def token_overlap(prompt: Collection[int], concept: Collection[int]) -> float:
    """Share of the concept's tokens found in the prompt, SPM Eq. 10: |T(c) ∩ T(p)| / |T(c)|.

    Args:
        prompt: Token ids of the prompt, without begin, end and padding.
        concept: Token ids of the concept's name, likewise.

    Returns:
        In [0, 1]; 0 for a concept without tokens.
    """
    wanted = set(concept)
    return len(wanted & set(prompt)) / len(wanted) if wanted else 0.0


def shared_tokens(prompt: Sequence[tuple[int, str]], concept: Collection[int]) -> tuple[str, ...]:
    """Returns the text of the prompt's tokens that the concept's name holds too, in the prompt's order, once each."""
    wanted = set(concept)
    return tuple(dict.fromkeys(text for token, text in prompt if token in wanted))
