"""Qwen-Image: a Qwen2.5-VL chat model reads the prompt; true guidance in calls of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from safegen.backend.base import Capabilities
from safegen.backend.families.chat import chat_reader, dropped
from safegen.backend.families.family import mask_of, side
from safegen.backend.families.patches import from_patches, to_patches
from safegen.backend.families.single import SingleEncoder
from safegen.backend.words import Words


class QwenImage(SingleEncoder):
    """A transformer that reads the chat model's last states beside the image's tokens."""

    stem = "qwen-image"
    looked_for = (
        "a `transformer` (QwenImageTransformer2DModel) with a `text_encoder` (Qwen2_5_VLForConditionalGeneration) "
        "(Qwen-Image)"
    )
    blocks = (QwenImageTransformerBlock,)
    capabilities = Capabilities(trains=False, negatives=False, calls=2)
    batch = 4
    mask = "encoder_hidden_states_mask"
    options: ClassVar[Mapping[str, Any]] = {"output_hidden_states": True}
    result = (2, 0, -1)

    @staticmethod
    def detect(pipe: Any) -> bool:
        """See `Family`."""
        return (
            side(pipe, "transformer", QwenImageTransformer2DModel)
            and side(pipe, "text_encoder", Qwen2_5_VLForConditionalGeneration)
            and isinstance(getattr(pipe, "prompt_template_encode", None), str)
        )

    def read_by(self, pipe: Any) -> dict[str, Words]:
        """See `Family`."""
        before, _, after = pipe.prompt_template_encode.partition("{}")
        return {self.encoder: chat_reader(pipe, self.encoder, (before, after))}

    def taken(self, output: Any) -> Tensor:
        """See `SingleEncoder`."""
        return output.hidden_states[-1]

    def cut(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """See `SingleEncoder`: without the system's message."""
        return dropped(states, mask, int(self.pipe.prompt_template_encode_start_idx))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backend`: channels of the autoencoder, height and width."""
        size = int(self.pipe.default_sample_size)
        return int(self.denoiser.config.in_channels) // 4, size, size

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """See `Backend`."""
        height, width = x_t.shape[-2:]
        found = self.denoiser(
            hidden_states=to_patches(x_t),
            timestep=t / 1000,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=mask_of(states),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return from_patches(found, x_t.shape)
