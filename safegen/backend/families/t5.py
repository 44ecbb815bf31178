"""What the families with a T5 text encoder share."""

from __future__ import annotations

from typing import Any

from transformers import T5EncoderModel, UMT5EncoderModel

from safegen.backend.words import Words

T5 = (T5EncoderModel, UMT5EncoderModel)


def t5_reader(pipe: Any, name: str, length: int) -> Words:
    """Returns the words of a T5 text encoder.

    Args:
        pipe: The pipeline.
        name: Its text encoder ("text_encoder_2" goes with "tokenizer_2").
        length: Ids that the pipeline gives it by default.
    """
    tokenizer: Any = getattr(pipe, name.replace("text_encoder", "tokenizer"))
    return Words(tokenizer, size=int(getattr(pipe, name).config.vocab_size), length=length)


def t5_states(output: Any) -> Any:
    """Returns the states [n, tokens, width] of a T5 text encoder's output."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state
