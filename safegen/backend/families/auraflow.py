"""AuraFlow: one T5 text encoder (Pile-T5), whose padding is set to 0."""

from __future__ import annotations

from typing import Any

from diffusers import AuraFlowTransformer2DModel
from diffusers.models.transformers.auraflow_transformer_2d import (
    AuraFlowJointTransformerBlock,
    AuraFlowSingleTransformerBlock,
)
from torch import Tensor

from safegen.backend.base import Capabilities
from safegen.backend.families.family import side
from safegen.backend.families.single import SingleEncoder
from safegen.backend.families.t5 import T5, t5_reader
from safegen.backend.words import Words


class AuraFlow(SingleEncoder):
    """A transformer that reads T5's tokens beside the image's."""

    stem = "auraflow"
    looked_for = "a `transformer` (AuraFlowTransformer2DModel) with a `text_encoder` (UMT5EncoderModel) (AuraFlow)"
    blocks = (AuraFlowJointTransformerBlock, AuraFlowSingleTransformerBlock)
    capabilities = Capabilities(trains=False, negatives=True)

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return side(pipe, "transformer", AuraFlowTransformer2DModel) and side(pipe, "text_encoder", T5)

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        return {self.encoder: t5_reader(pipe, self.encoder, 256)}

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        return self.denoiser(x_t, encoder_hidden_states=states, timestep=t / 1000, return_dict=False)[0]
