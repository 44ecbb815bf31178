"""FLUX.1 (dev, schnell, and what is built on the same transformer): CLIP's pooled vector and T5's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from safegen.backend.base import IMAGE, Call, Capabilities, Input, Strand
from safegen.backend.families.clip import clip_readers, packed
from safegen.backend.families.family import Family, reads_more, several, side, timestep_of
from safegen.backend.families.patches import from_patches, to_patches
from safegen.backend.families.t5 import t5_reader, t5_states
from safegen.backend.words import Words

_CLIP, _T5 = "text_encoder", "text_encoder_2"
_T5_LENGTH = 512  # default of the pipeline's max_sequence_length
_GUIDANCE = 3.5  # default of the guidance-distilled model
# Further channels, in latents: a depth map or edges (Depth, Canny), or an image and its mask in full size (Fill).
_BESIDE: Mapping[float, tuple[Input, ...]] = {1: ("control",), 5: ("image", "mask")}


class Flux(Family):
    """A transformer that reads T5's tokens, and CLIP's pooled vector, which is what the gate scores.

    Packed conditioning is [rows, T5's tokens + 1, width]; the last token is the pooled vector. Latents are packed in
    2x2 patches here as the transformer takes them.
    """

    stem = "flux1"
    looked_for = (
        "a `transformer` (FluxTransformer2DModel) with a `text_encoder` (CLIPTextModel) and a `text_encoder_2` "
        "(T5EncoderModel) (FLUX.1)"
    )
    blocks = (FluxTransformerBlock, FluxSingleTransformerBlock)
    capabilities = Capabilities(trains=False, negatives=False, calls=2)

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return (
            side(pipe, "transformer", FluxTransformer2DModel)
            and side(pipe, _CLIP, CLIPTextModel)
            and side(pipe, _T5, T5EncoderModel)
        )

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        return clip_readers(pipe, [_CLIP]) | {_T5: t5_reader(pipe, _T5, _T5_LENGTH)}

    def published(self) -> str | None:
        """See `Family`."""
        config = self.denoiser.config
        published = (config.num_layers, config.num_single_layers, config.joint_attention_dim) == (19, 38, 4096)
        return "flux1" if published else None

    def encode(self, ids: Tensor) -> Tensor:
        """See `TextReader`: CLIP's pooled vector as one token, [n, 1, width]."""
        return torch.cat([output.pooler_output for output in self.run_encoder(_CLIP, ids)])[:, None]

    def condition(self, texts: Sequence[str]) -> Tensor:
        """See `Backend`."""
        pooled = self.encode(self.tokenise(texts))[:, 0]
        t5 = torch.cat([t5_states(o) for o in self.run_encoder(_T5, self.readers[_T5].tokenise(texts))])
        return packed(t5, pooled)

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""
        yield t5_states(output) if encoder == _T5 else output.pooler_output[:, None]

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`. Negative prompts are encoded as prompts are, in a call of their own."""
        found = several(result, 3)
        return (_strands(found[0], found[1]), ()) if found else ((), ())

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backend`: channels of the autoencoder, height and width."""
        size = int(self.pipe.default_sample_size)
        return int(self.denoiser.config.in_channels) // 4, size, size

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        n, _, height, width = x_t.shape
        places = torch.zeros(height // 2, width // 2, 3, device=x_t.device, dtype=x_t.dtype)
        places[..., 1] += torch.arange(height // 2, device=x_t.device)[:, None]
        places[..., 2] += torch.arange(width // 2, device=x_t.device)[None]
        guided = self.denoiser.config.guidance_embeds
        found = self.denoiser(
            to_patches(x_t),
            encoder_hidden_states=states[:, :-1],
            pooled_projections=states[:, -1, : self.denoiser.config.pooled_projection_dim],
            timestep=t / 1000,
            img_ids=places.flatten(0, 1),
            txt_ids=places.new_zeros(states.shape[1] - 1, 3),
            guidance=x_t.new_full((n,), _GUIDANCE) if guided else None,
            return_dict=False,
        )[0]
        return from_patches(found, x_t.shape)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        given = self.given(args, kwargs)
        states = self.read(given, "encoder_hidden_states")
        pooled = self.read(given, "pooled_projections", 2)
        tensors = (states, pooled)
        more = reads_more(given) or has_references(given.get("img_ids"))
        return Call(pooled[:, None], timestep_of(given), _strands(*tensors), tensors, more, self.inputs(given))

    def inputs(self, given: Mapping[str, Any]) -> tuple[Input, ...]:
        """See `Family`: pictures stand beside the latents in channels, or behind them as tokens."""
        latents = int(self.denoiser.out_channels)
        further = int(self.denoiser.config.in_channels) - latents
        references = IMAGE if has_references(given.get("img_ids")) else ()
        return (*_BESIDE.get(further / latents, ()), *references, *super().inputs(given))


def has_references(places: Any) -> bool:
    """Tells whether there are tokens of reference images among those of the image: their first coordinate is not 0."""
    return isinstance(places, Tensor) and bool(places[..., 0].any())


def _strands(states: Tensor, pooled: Tensor) -> tuple[Strand, ...]:
    return Strand(_CLIP, pooled[:, None]), Strand(_T5, states)
