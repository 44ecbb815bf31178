"""HunyuanDiT: a bilingual CLIP (a BERT) and a multilingual T5, both by cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import HunyuanDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiTBlock
from torch import Tensor, nn
from transformers import BertModel

from safegen.backend.base import Call, Capabilities, Strand
from safegen.backend.families.family import Family, mask_of, masked, reads_more, real_mean, side, timestep_of
from safegen.backend.families.t5 import T5, t5_reader, t5_states
from safegen.backend.words import Words

_BERT, _T5 = "text_encoder", "text_encoder_2"
_LENGTHS = {_BERT: 77, _T5: 256}
_SIZE = 1024  # pixels of the images that it was trained on


class HunyuanDiT(Family):
    """A transformer that reads BERT's and T5's tokens; the gate scores the mean of BERT's that are read.

    Packed conditioning is [rows, 77 + 256, width], 0 where nothing is read.
    """

    stem = "hunyuan-dit"
    looked_for = (
        "a `transformer` (HunyuanDiT2DModel) with a `text_encoder` (BertModel) and a `text_encoder_2` (T5EncoderModel) "
        "(HunyuanDiT)"
    )
    blocks = (HunyuanDiTBlock,)
    capabilities = Capabilities(trains=False, negatives=False)

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return side(pipe, "transformer", HunyuanDiT2DModel) and side(pipe, _BERT, BertModel) and side(pipe, _T5, T5)

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        size = int(pipe.text_encoder.config.vocab_size)
        return {
            _BERT: Words(pipe.tokenizer, size=size, length=_LENGTHS[_BERT]),
            _T5: t5_reader(pipe, _T5, _LENGTHS[_T5]),
        }

    def _states(self, name: str, ids: Tensor) -> Tensor:
        outputs = self.run_encoder(name, ids, masked=True)
        return masked(torch.cat([t5_states(output) for output in outputs]), self.readers[name].mask(ids))

    def encode(self, ids: Tensor) -> Tensor:
        """See `TextReader`: BERT's states, 0 for padding."""
        return self._states(_BERT, ids)

    def views(self, states: Tensor) -> tuple[Tensor, ...]:
        """See `TextReader`."""
        return (real_mean(states),)

    def condition(self, texts: Sequence[str]) -> Tensor:
        """See `Backend`."""
        parts = [self._states(name, self.readers[name].tokenise(texts)) for name in (_BERT, _T5)]
        width = max(part.shape[-1] for part in parts)
        return torch.cat([nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts], dim=1)

    def made(self, encoder: str, given: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
        """See `Backend`."""
        states = t5_states(output)
        yield states
        yield masked(states, given.get("attention_mask"))

    def returned(self, result: Any) -> tuple[tuple[Strand, ...], tuple[Strand, ...]]:
        """See `Backend`. Each text encoder is run in a call of its own, which says nothing of whole rows."""
        return (), ()

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`; as for a square image of the size that the model was trained on, without its variance."""
        model, config = self.denoiser, self.denoiser.config
        n, side_of_grid = len(x_t), x_t.shape[-1] // config.patch_size
        bert = states[:, : _LENGTHS[_BERT], : config.cross_attention_dim].contiguous()
        t5 = states[:, _LENGTHS[_BERT] :, : config.cross_attention_dim_t5].contiguous()
        grid = (side_of_grid, side_of_grid)
        rotary = get_2d_rotary_pos_embed(model.inner_dim // model.num_heads, ((0, 0), grid), grid, output_type="pt")
        found = model(
            x_t,
            t,
            encoder_hidden_states=bert,
            text_embedding_mask=mask_of(bert),
            encoder_hidden_states_t5=t5,
            text_embedding_mask_t5=mask_of(t5),
            image_meta_size=x_t.new_tensor([[_SIZE, _SIZE, _SIZE, _SIZE, 0, 0]] * n),
            style=torch.zeros(n, dtype=torch.long, device=x_t.device),
            image_rotary_emb=tuple(part.to(x_t.device) for part in rotary),
            return_dict=False,
        )[0]
        return found[:, : x_t.shape[1]]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`."""
        given = self.given(args, kwargs)
        bert, t5 = self.read(given, "encoder_hidden_states"), self.read(given, "encoder_hidden_states_t5")
        masks = [given.get(name) for name in ("text_embedding_mask", "text_embedding_mask_t5")]
        tensors = (bert, t5, *(mask for mask in masks if isinstance(mask, Tensor)))
        strands = (Strand(_BERT, bert), Strand(_T5, t5))
        read, inputs = masked(bert, masks[0]), self.inputs(given)
        return Call(read, timestep_of(given), strands, tensors, reads_more(given), inputs)
