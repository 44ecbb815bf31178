"""FLUX.2: a chat model (Mistral 3, or Qwen3 in Klein) reads the prompt; three of its layers go to the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from torch import Tensor
from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from safegen.backend.base import IMAGE, Call, Capabilities
from safegen.backend.families.chat import chat_reader, chat_template
from safegen.backend.families.family import side
from safegen.backend.families.flux import has_references
from safegen.backend.families.single import SingleEncoder
from safegen.backend.words import Words

_LAYERS = {Mistral3ForConditionalGeneration: (10, 20, 30), Qwen3ForCausalLM: (9, 18, 27)}  # the pipelines' defaults
_LENGTH = 512  # default of the pipeline's max_sequence_length
_GUIDANCE = 4.0


class Flux2(SingleEncoder):
    """A transformer that reads three layers of the chat model side by side, padding included."""

    stem = "flux2"
    looked_for = (
        "a `transformer` (Flux2Transformer2DModel) with a `text_encoder` (Mistral3ForConditionalGeneration, or "
        "Qwen3ForCausalLM) (FLUX.2)"
    )
    blocks = (Flux2TransformerBlock, Flux2SingleTransformerBlock)
    capabilities = Capabilities(trains=False, negatives=False, calls=2)
    batch = 4
    options: ClassVar[Mapping[str, Any]] = {"output_hidden_states": True, "use_cache": False}
    result = (2, 0, -1)

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return side(pipe, "transformer", Flux2Transformer2DModel) and side(pipe, "text_encoder", tuple(_LAYERS))

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        if isinstance(pipe.text_encoder, Qwen3ForCausalLM):
            messages: list[dict[str, Any]] = [{"role": "user", "content": ""}]
            template = chat_template(pipe.tokenizer, messages, add_generation_prompt=True, enable_thinking=False)
        else:
            system = [{"type": "text", "text": pipe.system_message}]
            messages = [{"role": "system", "content": system}, {"role": "user", "content": []}]
            template = chat_template(pipe.tokenizer, messages, add_generation_prompt=False)
        return {self.encoder: chat_reader(pipe, self.encoder, template, length=_LENGTH)}

    def taken(self, output: Any) -> Tensor:
        """See `SingleEncoder`."""
        layers = next(layers for kind, layers in _LAYERS.items() if isinstance(self.text_encoder, kind))
        return torch.cat([output.hidden_states[k] for k in layers], dim=-1)

    def encode(self, ids: Tensor) -> Tensor:
        """See `Backend`: padding is read too."""
        return torch.cat([self.taken(output) for output in self._encoded(ids)])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backend`: channels of a patch of 2x2, height and width in patches."""
        size = int(self.pipe.default_sample_size) // 2
        return int(self.denoiser.config.in_channels), size, size

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        n, _, height, width = x_t.shape
        first = torch.arange(1)
        grid = torch.cartesian_prod(first, torch.arange(height), torch.arange(width), first)
        words = torch.cartesian_prod(first, first, first, torch.arange(states.shape[1]))
        guided = self.denoiser.config.guidance_embeds
        found = self.denoiser(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=t / 1000,
            guidance=x_t.new_full((n,), _GUIDANCE) if guided else None,
            encoder_hidden_states=states,
            txt_ids=words.to(x_t.device).expand(n, -1, -1),
            img_ids=grid.to(x_t.device).expand(n, -1, -1),
            return_dict=False,
        )[0]
        return found.transpose(1, 2).reshape(x_t.shape)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`; reference images are read by no gate, nor is what a cache keeps of them."""
        found, given = super().call(args, kwargs), self.given(args, kwargs)
        references = has_references(given.get("img_ids")) or given.get("kv_cache") is not None
        inputs = found.inputs + (IMAGE if references else ())
        return replace(found, foreign=found.foreign or references, inputs=inputs)
