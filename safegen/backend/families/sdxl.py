"""Stable Diffusion XL: base and refiner, and the distilled schedules on the same U-Net (Turbo, LCM, Lightning)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from safegen.backend.base import Call, Capabilities, Strand
from safegen.backend.families.clip import clip_readers, packed, penultimate
from safegen.backend.families.family import Family, reads_more, several, side, timestep_of
from safegen.backend.families.sd import CHANNELS
from safegen.backend.words import ClipWords, Words

_ENCODERS = ("text_encoder", "text_encoder_2")
_FAMILIES = {(2048, (320, 640, 1280)): "sdxl", (1280, (384, 768, 1536, 1536)): "sdxl-refiner"}
_SIZE = 1024  # pixels of the images that it was trained on


class StableDiffusionXL(Family):
    """A U-Net conditioned on the penultimate states of one or two CLIP text encoders and a pooled vector.

    The gate scores each encoder by itself. Packed conditioning is [rows, 77 + 1, width]: the last token is the pooled
    vector of the second encoder.
    """

    stem = "sdxl"
    looked_for = (
        "a `unet` (UNet2DConditionModel, `addition_embed_type: text_time`) with a `text_encoder_2` "
        "(CLIPTextModelWithProjection), and a `text_encoder` (CLIPTextModel) except in the refiner (SDXL)"
    )
    blocks = (Transformer2DModel,)
    capabilities = Capabilities(trains=True, negatives=True)
    slot = "unet"
    modular = True
    channels = CHANNELS

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        unet = getattr(pipe, "unet", None)
        return (
            isinstance(unet, UNet2DConditionModel)
            and unet.config.get("addition_embed_type") == "text_time"
            and side(pipe, "text_encoder_2", CLIPTextModelWithProjection)
            and (getattr(pipe, "text_encoder", None) is None or side(pipe, "text_encoder", CLIPTextModel))
        )

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        return clip_readers(pipe, [name for name in _ENCODERS if getattr(pipe, name, None) is not None])

    def published(self) -> str | None:
        """See `Family`."""
        config = self.denoiser.config
        key = (config.cross_attention_dim, tuple(config.block_out_channels))
        return _FAMILIES.get(key)

    def graded(self) -> tuple[str, ...]:
        """See `Family`."""
        return tuple(self.readers)

    def _width(self, name: str) -> int:
        encoder: Any = self.text_encoders[name]
        return int(encoder.config.hidden_size)

    def encode(self, ids: Tensor) -> Tensor:
        """See `Backend`."""
        parts: list[Tensor] = []
        pooled = ids[:0]
        for name, reader in self.readers.items():
            assert isinstance(reader, ClipWords)
            assert isinstance(self.reader, ClipWords)
            outputs = self.run_encoder(name, self.reader.padded_as(ids, reader), output_hidden_states=True)
            found = [penultimate(output) for output in outputs]
            parts.append(torch.cat([states for states, _ in found]))
            pooled = torch.cat([one for _, one in found])[:, 0]
        return packed(torch.cat(parts, dim=-1), pooled)

    def views(self, states: Tensor) -> tuple[Tensor, ...]:
        """See `TextReader`: one for each text encoder."""
        return states[:, :-1].split([self._width(name) for name in self.readers], dim=-1)

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""
        if getattr(output, "hidden_states", None) is None:
            return
        states, pooled = penultimate(output)
        yield states
        if encoder == _ENCODERS[1]:
            yield pooled

    def _strands(self, states: Tensor | None, pooled: Tensor | None) -> tuple[Strand, ...]:
        if states is None or pooled is None:
            return ()
        widths = [self._width(name) for name in self.readers]
        parts = zip(self.readers, states.split(widths, dim=-1), strict=True)
        return (*(Strand(name, part) for name, part in parts), Strand(_ENCODERS[1], pooled[:, None]))

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`."""
        found = several(result, 4)
        return (self._strands(found[0], found[2]), self._strands(found[1], found[3])) if found else ((), ())

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`; as for a square image of the size that the model was trained on, not cropped."""
        unet = self.denoiser
        pooled = states[:, -1, : self._projected()]
        known = unet.add_embedding.linear_1.in_features - pooled.shape[-1]
        count = known // unet.config.addition_time_embed_dim
        # Six sizes; the refiner knows an aesthetic score (6, as its pipeline's default) in place of the last two.
        sizes = [_SIZE, _SIZE, 0, 0, *([6] if count == 5 else [_SIZE, _SIZE])]
        times = torch.tensor(sizes, dtype=states.dtype, device=states.device).expand(len(states), -1)
        added = {"text_embeds": pooled, "time_ids": times}
        return unet(x_t, t, encoder_hidden_states=states[:, :-1], added_cond_kwargs=added).sample

    def _projected(self) -> int:
        encoder: Any = self.text_encoders[_ENCODERS[1]]
        return int(encoder.config.projection_dim)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        given = self.given(args, kwargs)
        states = self.read(given, "encoder_hidden_states")
        pooled = self.read(given.get("added_cond_kwargs") or {}, "text_embeds", 2)
        strands, tensors = self._strands(states, pooled), (states, pooled)
        return Call(packed(states, pooled), timestep_of(given), strands, tensors, reads_more(given), self.inputs(given))
