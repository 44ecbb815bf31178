"""Z-Image: a Qwen3 chat model reads the prompt; each row of conditioning has its own length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor
from transformers import PreTrainedModel

from safegen.backend.base import IMAGE, Call, Capabilities, Strand
from safegen.backend.families.chat import chat_reader, chat_template, dropped
from safegen.backend.families.family import reads_more, side, timestep_of
from safegen.backend.families.single import SingleEncoder
from safegen.backend.words import Words
from safegen.errors import UnsupportedBackendError


class ZImage(SingleEncoder):
    """A transformer that reads a list of the chat model's states, one [tokens, width] per row."""

    stem = "z-image"
    looked_for = "a `transformer` (ZImageTransformer2DModel) with a `text_encoder` (Qwen3Model) (Z-Image)"
    blocks = (ZImageTransformerBlock,)
    capabilities = Capabilities(trains=False, negatives=True)
    batch = 4
    options: ClassVar[Mapping[str, Any]] = {"output_hidden_states": True}
    result = (2, 0, 1)

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return side(pipe, "transformer", ZImageTransformer2DModel) and side(pipe, "text_encoder", PreTrainedModel)

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        messages = [{"role": "user", "content": ""}]
        template = chat_template(pipe.tokenizer, messages, add_generation_prompt=True, enable_thinking=True)
        return {self.encoder: chat_reader(pipe, self.encoder, template)}

    def taken(self, output: Any) -> Tensor:
        """See `SingleEncoder`."""
        return output.hidden_states[-2]

    def cut(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """See `SingleEncoder`: without padding."""
        return dropped(states, mask, 0)

    def strands(self, states: Any) -> tuple[Strand, ...]:
        """See `SingleEncoder`."""
        rows = _rows(states)
        return (Strand(self.encoder, _padded(rows)),) if rows else ()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backend`: channels, height and width; the size is that of images of 1024 pixels."""
        return int(self.denoiser.config.in_channels), 128, 128

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        rows = [row[row.ne(0).any(dim=-1)] for row in states]
        found = self.denoiser(list(x_t[:, :, None]), (1000 - t) / 1000, rows, return_dict=False)[0]
        return -torch.stack(list(found))[:, :, 0]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        given = self.given(args, kwargs)
        rows = _rows(given.get("cap_feats"))
        if not rows:
            raise UnsupportedBackendError(
                f"the {type(self.denoiser).__name__} was called without cap_feats, a list of [tokens, width]; safegen "
                "reads the prompt there and does not let a step pass unread"
            )
        states = _padded(rows)
        images = given.get("siglip_feats") is not None
        inputs = self.inputs(given) + (IMAGE if images else ())
        more = images or reads_more(given)
        return Call(states, -timestep_of(given, "t"), (Strand(self.encoder, states),), tuple(rows), more, inputs)


def _rows(states: Any) -> list[Tensor]:
    rows = list(states) if isinstance(states, list | tuple) else []
    return rows if all(isinstance(row, Tensor) and row.ndim == 2 for row in rows) else []


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
