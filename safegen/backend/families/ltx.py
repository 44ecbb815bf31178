"""LTX-Video: one T5 text encoder; videos."""

from __future__ import annotations

from typing import Any

from diffusers import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from torch import Tensor

from safegen.backend.base import Capabilities
from safegen.backend.families.family import mask_of, side
from safegen.backend.families.single import SingleEncoder
from safegen.backend.families.t5 import T5, t5_reader
from safegen.backend.words import Words

_SHAPE = (2, 16, 22)  # frames, height and width of short latents: 9 frames of 512x704 pixels
_RATE = 25  # frames a second, the pipeline's default


class LtxVideo(SingleEncoder):
    """A transformer that reads T5's tokens through cross-attention."""

    stem = "ltx"
    looked_for = "a `transformer` (LTXVideoTransformer3DModel) with a `text_encoder` (T5EncoderModel) (LTX-Video)"
    blocks = (LTXVideoTransformerBlock,)
    capabilities = Capabilities(trains=False, negatives=True)
    mask = "encoder_attention_mask"
    told = False

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return side(pipe, "transformer", LTXVideoTransformer3DModel) and side(pipe, "text_encoder", T5)

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        return {self.encoder: t5_reader(pipe, self.encoder, 128)}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backend`."""
        return int(self.denoiser.config.in_channels), *_SHAPE

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        pipe = self.pipe
        n, _, frames, height, width = x_t.shape
        space = pipe.vae_spatial_compression_ratio
        found = self.denoiser(
            x_t.flatten(2).transpose(1, 2),
            encoder_hidden_states=states,
            timestep=t,
            encoder_attention_mask=mask_of(states),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(pipe.vae_temporal_compression_ratio / _RATE, space, space),
            return_dict=False,
        )[0]
        return found.transpose(1, 2).reshape(n, -1, frames, height, width)
