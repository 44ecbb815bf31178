"""Stable Diffusion 3 and 3.5: two CLIP text encoders, and a T5 that may be left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from safegen.backend.base import Call, Capabilities, Input, Strand
from safegen.backend.families.clip import clip_readers, packed, penultimate
from safegen.backend.families.family import Family, reads_more, several, side, timestep_of
from safegen.backend.families.t5 import t5_reader, t5_states
from safegen.backend.words import ClipWords, Words

_CLIP = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"
_T5_LENGTH = 256  # default of the pipeline's max_sequence_length


class StableDiffusion3(Family):
    """A transformer that reads CLIP's and T5's tokens one after the other, and a pooled vector of both CLIPs.

    The gate scores each CLIP by itself. Packed conditioning is [rows, 77 + T5's tokens + 1, width]; the last token is
    the pooled vector.
    """

    stem = "sd3"
    looked_for = (
        "a `transformer` (SD3Transformer2DModel) with `text_encoder` and `text_encoder_2` "
        "(CLIPTextModelWithProjection) and, "
        "where there is one, `text_encoder_3` (T5EncoderModel) (Stable Diffusion 3, 3.5)"
    )
    blocks = (JointTransformerBlock, SD3SingleTransformerBlock)
    capabilities = Capabilities(trains=False, negatives=True)
    channels: ClassVar[Mapping[int, tuple[Input, ...]]] = {17: ("image", "mask")}  # inpainting

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return (
            side(pipe, "transformer", SD3Transformer2DModel)
            and all(side(pipe, name, CLIPTextModelWithProjection) for name in _CLIP)
            and side(pipe, _T5, (T5EncoderModel, type(None)))
        )

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        readers = clip_readers(pipe, _CLIP)
        return readers if pipe.text_encoder_3 is None else readers | {_T5: t5_reader(pipe, _T5, _T5_LENGTH)}

    def graded(self) -> tuple[str, ...]:
        """See `Family`."""
        return _CLIP

    def _widths(self) -> list[int]:
        encoders: list[Any] = [self.text_encoders[name] for name in _CLIP]
        return [int(encoder.config.hidden_size) for encoder in encoders]

    def _clip(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the states [n, 77, both widths] and pooled vectors [n, both] of the two CLIPs."""
        states: list[Tensor] = []
        pooled: list[Tensor] = []
        for name in _CLIP:
            reader = self.readers[name]
            assert isinstance(reader, ClipWords)
            assert isinstance(self.reader, ClipWords)
            outputs = self.run_encoder(name, self.reader.padded_as(ids, reader), output_hidden_states=True)
            found = [penultimate(output) for output in outputs]
            states.append(torch.cat([one for one, _ in found]))
            pooled.append(torch.cat([one for _, one in found])[:, 0])
        return torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)

    def encode(self, ids: Tensor) -> Tensor:
        """See `TextReader`: what the two CLIPs say, [n, 77, both widths]."""
        return self._clip(ids)[0]

    def views(self, states: Tensor) -> tuple[Tensor, ...]:
        """See `TextReader`: one for each CLIP."""
        return states.split(self._widths(), dim=-1)

    def condition(self, texts: Sequence[str]) -> Tensor:
        """See `Backend`."""
        states, pooled = self._clip(self.tokenise(texts))
        width = int(self.denoiser.config.joint_attention_dim)
        states = torch.nn.functional.pad(states, (0, width - states.shape[-1]))
        t5 = states.new_zeros(len(states), _T5_LENGTH, width)
        if _T5 in self.readers:
            t5 = torch.cat([t5_states(o) for o in self.run_encoder(_T5, self.readers[_T5].tokenise(texts))])
        return packed(torch.cat([states, t5], dim=1), pooled)

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""
        if encoder == _T5:
            yield t5_states(output)
        elif getattr(output, "hidden_states", None) is not None:
            yield from penultimate(output)

    def _strands(self, states: Tensor | None, pooled: Tensor | None) -> tuple[Strand, ...]:
        if states is None or pooled is None:
            return ()
        widths = self._widths()
        encoders: list[Any] = [self.text_encoders[name] for name in _CLIP]
        first, second, rest = states[:, : self.window].split([*widths, states.shape[-1] - sum(widths)], dim=-1)
        parts = pooled[:, None].split([int(encoder.config.projection_dim) for encoder in encoders], dim=-1)
        strands = [Strand(name, part) for name, part in zip((*_CLIP, *_CLIP), (first, second, *parts), strict=True)]
        # What fills CLIP's tokens up to T5's width is 0 in a prompt's own conditioning; anything else has no origin.
        return (*strands, Strand(_T5, rest), Strand(_T5, states[:, self.window :]))

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`."""
        found = several(result, 4)
        return (self._strands(found[0], found[2]), self._strands(found[1], found[3])) if found else ((), ())

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        pooled = states[:, -1, : self.denoiser.config.pooled_projection_dim]
        return self.denoiser(
            x_t, encoder_hidden_states=states[:, :-1], pooled_projections=pooled, timestep=t, return_dict=False
        )[0]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        given = self.given(args, kwargs)
        states = self.read(given, "encoder_hidden_states")
        pooled = self.read(given, "pooled_projections", 2)
        clip = states[:, : self.window, : sum(self._widths())]
        strands, tensors = self._strands(states, pooled), (states, pooled)
        return Call(clip, timestep_of(given), strands, tensors, reads_more(given), self.inputs(given))
