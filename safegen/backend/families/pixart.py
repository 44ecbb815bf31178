"""PixArt-α and PixArt-Σ: one T5 text encoder, whose padding the transformer does not read."""

from __future__ import annotations

from typing import Any

from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from safegen.backend.base import Capabilities
from safegen.backend.families.family import mask_of, side
from safegen.backend.families.single import SingleEncoder
from safegen.backend.families.t5 import T5, t5_reader
from safegen.backend.words import Words

_LENGTHS = {"PixArtAlpha": 120}  # default of max_sequence_length; 300 elsewhere


class PixArt(SingleEncoder):
    """A transformer that reads T5's tokens through cross-attention."""

    stem = "pixart"
    looked_for = (
        "a `transformer` (PixArtTransformer2DModel) with a `text_encoder` (T5EncoderModel) (PixArt-α, PixArt-Σ)"
    )
    blocks = (BasicTransformerBlock,)
    capabilities = Capabilities(trains=True, negatives=True)
    mask = "encoder_attention_mask"

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return side(pipe, "transformer", PixArtTransformer2DModel) and side(pipe, "text_encoder", T5)

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        length = next((n for name, n in _LENGTHS.items() if type(pipe).__name__.startswith(name)), 300)
        return {self.encoder: t5_reader(pipe, self.encoder, length)}

    def published(self) -> str | None:
        """See `Family`."""
        config = self.denoiser.config
        published = (config.num_layers, config.num_attention_heads, config.caption_channels) == (28, 16, 4096)
        return "pixart" if published else None

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`; without the variance that it may predict too."""
        given: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:  # PixArt-α at 1024: a square image
            size = 8.0 * self.latent_shape[-1]
            given = {"resolution": x_t.new_full((len(x_t), 2), size), "aspect_ratio": x_t.new_ones(len(x_t), 1)}
        found = self.denoiser(
            x_t,
            encoder_hidden_states=states,
            encoder_attention_mask=mask_of(states),
            timestep=t,
            added_cond_kwargs=given,
            return_dict=False,
        )[0]
        return found[:, : x_t.shape[1]]
