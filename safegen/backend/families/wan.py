"""Wan 2.1: one T5 text encoder (UMT5), whose padding is set to 0; videos; guidance in calls of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from safegen.backend.base import IMAGE, Call, Capabilities
from safegen.backend.families.family import side
from safegen.backend.families.single import SingleEncoder
from safegen.backend.families.t5 import T5, t5_reader
from safegen.backend.words import Words
from safegen.errors import UnsupportedBackendError

_SHAPE = (3, 60, 104)  # frames, height and width of short latents: 9 frames of 480x832 pixels


class Wan(SingleEncoder):
    """A transformer that reads T5's tokens through cross-attention."""

    stem = "wan"
    looked_for = "one `transformer` (WanTransformer3DModel) with a `text_encoder` (UMT5EncoderModel) (Wan 2.1)"
    blocks = (WanTransformerBlock,)
    capabilities = Capabilities(trains=False, negatives=True, calls=2)
    result = (2, 0, 1)
    channels = {20: IMAGE}  # image-to-video: which frames are given (4), and these

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return side(pipe, "transformer", WanTransformer3DModel) and side(pipe, "text_encoder", T5)

    def refuse(self, pipe: Any) -> None:
        """See `Family`: half of a run of Wan 2.2 is drawn by a second denoiser."""
        if getattr(pipe, "transformer_2", None) is not None:
            raise UnsupportedBackendError(
                f"{type(pipe).__name__} has two denoisers, `transformer` and `transformer_2` (Wan 2.2), and draws the "
                "last steps with the second; expected one. Membranes on one of them would not guard the video"
            )

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        return {self.encoder: t5_reader(pipe, self.encoder, 512)}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backend`."""
        return int(self.denoiser.config.in_channels), *_SHAPE

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        return self.denoiser(x_t, timestep=t, encoder_hidden_states=states, return_dict=False)[0]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See `Backend`; the image that image-to-video starts from is read by no gate."""
        found = super().call(args, kwargs)
        images = self.given(args, kwargs).get("encoder_hidden_states_image") is not None
        inputs = found.inputs + (IMAGE if images else ())
        return replace(found, foreign=found.foreign or images, inputs=inputs)
