"""Tiny parts of pipelines, built from the true config classes with random weights; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tiny import WORDS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENS = 16


def t5_tokenizer() -> Any:
    """A T5 tokenizer that spells: every letter is a piece, and each of `WORDS` is one."""
    letters = [chr(k) for k in range(33, 127)]
    pieces = [*letters, "▁", *(f"▁{letter}" for letter in letters), *(f"▁{word}" for word in WORDS)]
    vocabulary = [(piece, -10.0 if len(piece) < 3 else -1.0) for piece in dict.fromkeys(pieces)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0)]
    return T5Tokenizer(vocab=[*special, *vocabulary], extra_ids=0, model_max_length=TOKENS)


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(*, left: bool = False) -> Any:
    """A byte-level tokenizer with a chat template: every byte is a token, and each of `WORDS` is one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = list(f"Ġ{word}")
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])
            if "".join(pair) not in vocabulary:
                merges.append(pair)
                vocabulary["".join(pair)] = len(vocabulary)
            pieces[-2:] = ["".join(pair)]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left" if left else "right",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> Any:
    """A byte-level tokenizer that puts a begin token before each text, as Gemma's does."""
    from tokenizers import processors

    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=["<bos>", "$A"], pair=None, special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.model_max_length = 64
    return tokenizer


def clip(width: int, *, project: int = 0, pad: str = "", tokens: int = TOKENS) -> tuple[Any, Any]:
    """A CLIP text encoder and its tokenizer."""
    tokenizer = tiny_tokenizer(tokens)
    if pad:
        tokenizer.pad_token = pad
    special: dict[str, Any] = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        projection_dim=project or width,
        **special,
    )
    return (CLIPTextModelWithProjection if project else CLIPTextModel)(config).eval(), tokenizer


def t5(width: int, kind: Any = T5EncoderModel, config: Any = T5Config) -> tuple[Any, Any]:
    """A T5 text encoder and its tokenizer."""
    tokenizer = t5_tokenizer()
    sizes: dict[str, Any] = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return kind(config(vocab_size=len(tokenizer), **sizes)).eval(), tokenizer


def vae(channels: int = 4, *, blocks: int = 2, **changes: Any) -> Any:
    """An autoencoder of 2^(blocks - 1) pixels a latent."""
    values: dict[str, Any] = dict(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
    )
    return AutoencoderKL(**values | changes).eval()


def flow() -> Any:
    """The scheduler of flow-matching models."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def made(kind: Any, seed: int = 0, **parts: Any) -> Any:
    """A pipeline of these parts, quiet."""
    torch.manual_seed(seed)
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
