"""The sites of a base family without its weights: what a file of that family may hold, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from safegen.backend.sites import Sites, find_sites
from safegen.errors import UnsupportedBackendError, did_you_mean

# What the families change of the defaults of diffusers' U-Net (block widths 320, 640, 1280, 1280).
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
BLANK_FAMILIES = tuple(_CONFIGS)


def blank_denoiser(family: str) -> tuple[UNet2DConditionModel, Sites]:
    """Returns a family's denoiser on the meta device, where it has shapes and no values, and its sites.

    Args:
        family: One of `BLANK_FAMILIES`.

    Raises:
        UnsupportedBackendError: No such family.
    """
    config = _CONFIGS.get(family)
    if config is None:
        raise UnsupportedBackendError(
            f"base family {family!r}: its layout is not known.{did_you_mean(family, _CONFIGS)}"
        )
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**config)
    return denoiser, find_sites(denoiser, Transformer2DModel)
