"""PixArt-α and PixArt-Σ: one T5 text encoder, whose padding the transformer does not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from safegen.backend.base import Call, Capabilities, Strand
from safegen.backend.families.family import (
    Family,
    mask_of,
    masked,
    reads_more,
    real_mean,
    several,
    side,
    timestep_of,
)
from safegen.backend.families.t5 import T5, t5_reader, t5_states
from safegen.backend.words import Words

_ENCODER = "text_encoder"
_LENGTHS = {"PixArtAlpha": 120}  # default of max_sequence_length; 300 elsewhere


class PixArt(Family):
    """A transformer that reads T5's tokens through cross-attention; the gate scores the mean of those that it reads."""

    looked_for = "a `transformer` (PixArtTransformer2DModel) with a `text_encoder` (T5EncoderModel) (PixArt-α, PixArt-Σ)"
    blocks: ClassVar[tuple[type[nn.Module], ...]] = (BasicTransformerBlock,)
    capabilities = Capabilities(trains=True, negatives=True)

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return side(pipe, "transformer", PixArtTransformer2DModel) and side(pipe, _ENCODER, T5)

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        length = next((n for name, n in _LENGTHS.items() if type(pipe).__name__.startswith(name)), 300)
        return {_ENCODER: t5_reader(pipe, _ENCODER, length)}

    def name(self) -> str:
        """See `Family`."""
        config = self.denoiser.config
        published = (config.num_layers, config.num_attention_heads, config.caption_channels) == (28, 16, 4096)
        return "pixart" if published else f"pixart-{self.sites.architecture[:8]}"

    def encode(self, ids: Tensor) -> Tensor:
        """See `Backend`: T5's states, 0 for padding."""
        states = torch.cat([t5_states(output) for output in self.run_encoder(_ENCODER, ids, masked=True)])
        return masked(states, self.reader.mask(ids))

    def views(self, states: Tensor) -> tuple[Tensor, ...]:
        """See `TextReader`."""
        return (real_mean(states),)

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""
        yield t5_states(output)

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`."""
        found = several(result, 4)
        return (_strands(found[0]), _strands(found[2])) if found else ((), ())

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`; without the variance that it may predict too."""
        given: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:  # PixArt-α at 1024: a square image
            size = 8.0 * self.latent_shape[-1]
            given = {
                "resolution": x_t.new_full((len(x_t), 2), size),
                "aspect_ratio": x_t.new_ones(len(x_t), 1),
            }
        found = self.denoiser(
            x_t,
            encoder_hidden_states=states,
            encoder_attention_mask=mask_of(states),
            timestep=t,
            added_cond_kwargs=given,
            return_dict=False,
        )[0]
        return found[:, : x_t.shape[1]]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        given = self.given(args, kwargs)
        states, mask = self.read(given, "encoder_hidden_states"), given.get("encoder_attention_mask")
        inputs = (states,) if mask is None else (states, mask)
        read = masked(states, mask if mask is None or mask.ndim == 2 else None)
        return Call(read, timestep_of(given), _strands(states), inputs, reads_more(given))


def _strands(states: Tensor | None) -> tuple[Strand, ...]:
    return () if states is None else (Strand(_ENCODER, states),)
