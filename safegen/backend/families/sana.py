"""Sana: Gemma's states, of which the pipeline keeps the first and the last tokens; linear attention."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor
from transformers import PreTrainedModel

from safegen.backend.base import Capabilities
from safegen.backend.families.family import mask_of, side
from safegen.backend.families.single import SingleEncoder, vocabulary_of
from safegen.backend.words import Words

_LENGTH = 300  # default of the pipeline's max_sequence_length


def _instruction(pipe: Any) -> str:
    """Returns what the pipeline puts before each prompt by default."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("complex_human_instruction")
    return "\n".join(parameter.default) if parameter is not None and isinstance(parameter.default, list) else ""


class Sana(SingleEncoder):
    """A transformer that reads Gemma's tokens through cross-attention. Grouped convolutions are no sites."""

    stem = "sana"
    looked_for = "a `transformer` (SanaTransformer2DModel) with a `text_encoder` (Gemma2Model) and a `tokenizer` (Sana)"
    blocks = (SanaTransformerBlock,)
    capabilities = Capabilities(trains=False, negatives=True)
    mask = "encoder_attention_mask"

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return side(pipe, "transformer", SanaTransformer2DModel) and side(pipe, "text_encoder", PreTrainedModel)

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        before = _instruction(pipe)
        more = len(pipe.tokenizer.encode(before)) - 2 if before else 0
        size = vocabulary_of(pipe.text_encoder)
        return {self.encoder: Words(pipe.tokenizer, size=size, length=_LENGTH + more, before=before)}

    def cut(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """See `SingleEncoder`: the begin token, and the last tokens, which hold the prompt."""
        return states if states.shape[1] <= _LENGTH else states[:, [0, *range(-_LENGTH + 1, 0)]]

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        config = self.denoiser.config
        found = self.denoiser(
            x_t,
            encoder_hidden_states=states,
            encoder_attention_mask=mask_of(states),
            timestep=t * config.timestep_scale,
            guidance=x_t.new_full((len(x_t),), 4.5 * config.guidance_embeds_scale) if config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return found[:, : x_t.shape[1]]
