"""Kandinsky 5 (images): CLIP's pooled vector and a Qwen2.5-VL chat model's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5TransformerDecoderBlock,
    Kandinsky5TransformerEncoderBlock,
)
from torch import Tensor
from transformers import CLIPTextModel, Qwen2_5_VLForConditionalGeneration

from safegen.backend.base import IMAGE, Call, Capabilities, Strand
from safegen.backend.families.chat import chat_reader
from safegen.backend.families.clip import clip_readers, packed
from safegen.backend.families.family import Family, several, side, timestep_of
from safegen.backend.words import Words

_CHAT, _CLIP = "text_encoder", "text_encoder_2"


class Kandinsky5(Family):
    """A transformer that reads the chat model's tokens, and CLIP's pooled vector, which is what the gate scores.

    Packed conditioning is [rows, the chat model's tokens + 1, width]; the last token is the pooled vector.
    """

    stem = "kandinsky5"
    looked_for = (
        "a `transformer` (Kandinsky5Transformer3DModel) with a `text_encoder` (Qwen2_5_VLForConditionalGeneration) and "
        "a `text_encoder_2` (CLIPTextModel) (Kandinsky 5)"
    )
    blocks = (
        Kandinsky5TransformerEncoderBlock,
        Kandinsky5TransformerDecoderBlock,
    )
    capabilities = Capabilities(trains=False, negatives=False, calls=2)

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return (
            side(pipe, "transformer", Kandinsky5Transformer3DModel)
            and side(pipe, _CHAT, Qwen2_5_VLForConditionalGeneration)
            and side(pipe, _CLIP, CLIPTextModel)
            and isinstance(getattr(pipe, "prompt_template", None), str)
        )

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        before, _, after = pipe.prompt_template.partition("{}")
        return clip_readers(pipe, [_CLIP]) | {_CHAT: chat_reader(pipe, _CHAT, (before, after))}

    def encode(self, ids: Tensor) -> Tensor:
        """See `TextReader`: CLIP's pooled vector as one token, [n, 1, width]."""
        return torch.cat([output.pooler_output for output in self.run_encoder(_CLIP, ids)])[:, None]

    def condition(self, texts: Sequence[str]) -> Tensor:
        """See `Backend`."""
        pooled = self.encode(self.tokenise(texts))[:, 0]
        ids = self.readers[_CHAT].tokenise(texts)
        found = [self._taken(output) for output in self.run_encoder(_CHAT, ids, output_hidden_states=True)]
        return packed(torch.cat(found), pooled)

    def _taken(self, output: Any) -> Tensor:
        """Returns the states without the system's message."""
        return output.hidden_states[-1][:, int(self.pipe.prompt_template_encode_start_idx) :]

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""
        if encoder == _CLIP:
            yield output.pooler_output[:, None]
        elif getattr(output, "hidden_states", None) is not None:
            yield self._taken(output)

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`. Negative prompts are encoded as prompts are, in a call of their own."""
        found = several(result, 3)
        return (_strands(found[0], found[1]), ()) if found else ((), ())

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backend`: channels, frames, height and width."""
        return int(self.denoiser.config.out_visual_dim), 1, 128, 128

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        frames, height, width = x_t.shape[-3:]
        x = x_t.movedim(1, -1)
        if self.denoiser.visual_cond:  # no image to start from: 0, and a mask of 0
            x = torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[..., :1])], dim=-1)
        places = [torch.arange(size, device=x.device) for size in (frames, height // 2, width // 2)]
        found = self.denoiser(
            hidden_states=x,
            encoder_hidden_states=states[:, :-1],
            pooled_projections=states[:, -1, : self.denoiser.config.in_text_dim2],
            timestep=t,
            visual_rope_pos=places,
            text_rope_pos=torch.arange(states.shape[1] - 1, device=x.device),
        ).sample
        return found.movedim(-1, 1)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`; an image that is drawn from is read by no gate."""
        given = self.given(args, kwargs)
        states = self.read(given, "encoder_hidden_states")
        pooled = self.read(given, "pooled_projections", 2)
        drawn_from = self.denoiser.visual_cond and self._starts_from_an_image(given)
        strands, inputs = _strands(states, pooled), self.inputs(given) + (IMAGE if drawn_from else ())
        return Call(pooled[:, None], timestep_of(given), strands, (states, pooled), drawn_from, inputs)

    def _starts_from_an_image(self, given: Mapping[str, Any]) -> bool:
        x, own = given.get("hidden_states"), int(self.denoiser.config.out_visual_dim)
        return isinstance(x, Tensor) and bool(x[..., own:].any())


def _strands(states: Tensor, pooled: Tensor) -> tuple[Strand, ...]:
    return Strand(_CLIP, pooled[:, None]), Strand(_CHAT, states)
