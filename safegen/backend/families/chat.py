"""What the families with a chat model for a text encoder share: prompts stand inside a template."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safegen.backend.families.single import vocabulary_of
from safegen.backend.words import Words

_MARK = "safegen-prompt"


def chat_template(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
    """Returns what a chat template puts before and behind a prompt.

    Args:
        tokenizer: A tokenizer, or a processor with a chat template.
        messages: The conversation, with the last message's content left to the prompt.
        options: Further arguments of `apply_chat_template`.
    """
    *earlier, last = messages
    content: Any = last["content"] + _MARK if isinstance(last["content"], str) else [{"type": "text", "text": _MARK}]
    text = tokenizer.apply_chat_template([*earlier, {**last, "content": content}], tokenize=False, **options)
    before, _, after = text.partition(_MARK)
    return before, after


def chat_reader(pipe: Any, name: str, template: tuple[str, str], *, length: int = 0) -> Words:
    """Returns the words of a chat model.

    Args:
        pipe: The pipeline.
        name: Its text encoder.
        template: What stands before and behind each prompt.
        length: Ids that the pipeline pads and cuts to; 0 where it pads to the longest prompt.
    """
    tokenizer: Any = getattr(pipe, name.replace("text_encoder", "tokenizer"))
    before, after = template
    return Words(
        getattr(tokenizer, "tokenizer", tokenizer),  # a processor holds one
        size=vocabulary_of(getattr(pipe, name)),
        length=length,
        before=before,
        after=after,
        special=False,
    )


def dropped(states: Tensor, mask: Tensor | None, first: int) -> Tensor:
    """Returns states without padding and without their first tokens, padded with 0 to the longest row.

    Args:
        states: [n, tokens, width].
        mask: Which tokens are no padding, [n, tokens].
        first: How many of these are left out.
    """
    if mask is None:
        return states[:, first:]
    rows = [row[keep.bool().to(row.device)][first:] for row, keep in zip(states, mask, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
