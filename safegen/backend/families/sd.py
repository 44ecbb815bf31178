"""Stable Diffusion 1.x and 2.x, and every pipeline of the same architecture (community models, safegen-mini)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModel

from safegen.backend.base import Call, Capabilities, Input, Strand
from safegen.backend.families.family import Family, reads_more, several, timestep_of
from safegen.backend.words import ClipWords, Words

# Channels that a U-Net reads beside the latents: an image and its mask to fill in, an image to edit, one to enlarge, a
# depth map.
CHANNELS: Mapping[int, tuple[Input, ...]] = {5: ("image", "mask"), 4: ("image",), 3: ("image",), 1: ("control",)}

# Cross-attention width and block widths tell the families of this architecture apart.
_FAMILIES = {
    (768, (320, 640, 1280, 1280)): "sd1",
    (1024, (320, 640, 1280, 1280)): "sd2",
    (192, (64, 128, 160)): "mini",
}
_ENCODER = "text_encoder"


class StableDiffusion(Family):
    """A pipeline with one CLIP text encoder and a U-Net conditioned on its last hidden state."""

    stem = "sd"
    looked_for = (
        "a `unet` (UNet2DConditionModel) with one `text_encoder` (CLIPTextModel) and a `tokenizer` (Stable Diffusion "
        "1.x, 2.x and models of the same architecture)"
    )
    blocks = (Transformer2DModel,)
    capabilities = Capabilities(trains=True, negatives=True)
    slot = "unet"
    channels = CHANNELS

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        unet, encoder = getattr(pipe, "unet", None), getattr(pipe, "text_encoder", None)
        return (
            isinstance(unet, UNet2DConditionModel)
            and isinstance(encoder, CLIPTextModel)
            and getattr(pipe, "tokenizer", None) is not None
            and getattr(pipe, "text_encoder_2", None) is None
            and unet.config.get("addition_embed_type") is None
        )

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        return {_ENCODER: ClipWords(pipe.tokenizer, size=int(pipe.text_encoder.config.vocab_size))}

    def published(self) -> str | None:
        """See `Family`."""
        config = self.denoiser.config
        key = (config.cross_attention_dim, tuple(config.block_out_channels))
        return _FAMILIES.get(key)

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Tensor:
        """See `Backend`."""
        encoder: Any = self.pipe.text_encoder
        return encoder(ids.to(encoder.device))[0]

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""
        yield output[0] if isinstance(output, tuple) else output.last_hidden_state

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`."""
        found = several(result, 2)
        return (_strands(found[0]), _strands(found[1])) if found else ((), ())

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        return self.denoiser(x_t, t, encoder_hidden_states=states).sample

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        given = self.given(args, kwargs)
        states = self.read(given, "encoder_hidden_states")
        inputs = self.inputs(given)
        return Call(states, timestep_of(given), _strands(states), (states,), reads_more(given), inputs)


def _strands(states: Tensor | None) -> tuple[Strand, ...]:
    return () if states is None else (Strand(_ENCODER, states),)
