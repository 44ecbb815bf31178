"""The host: finding its parts, attaching membranes to its denoiser, reading its conditioning."""

from __future__ import annotations

from typing import Any

from safegen.backend.base import Backend
from safegen.backend.families.auraflow import AuraFlow
from safegen.backend.families.family import Family
from safegen.backend.families.flux import Flux
from safegen.backend.families.flux2 import Flux2
from safegen.backend.families.hunyuan_dit import HunyuanDiT
from safegen.backend.families.kandinsky5 import Kandinsky5
from safegen.backend.families.ltx import LtxVideo
from safegen.backend.families.pixart import PixArt
from safegen.backend.families.plain import PlainTorch, TorchPipeline
from safegen.backend.families.qwen_image import QwenImage
from safegen.backend.families.sana import Sana
from safegen.backend.families.sd import StableDiffusion
from safegen.backend.families.sd3 import StableDiffusion3
from safegen.backend.families.sdxl import StableDiffusionXL
from safegen.backend.families.wan import Wan
from safegen.backend.families.z_image import ZImage
from safegen.errors import UnsupportedBackendError

__all__ = ["Backend", "TorchPipeline", "backend_of"]

_NUMBERS = ("", "_2", "_3")

_FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    Flux2,
    PixArt,
    QwenImage,
    ZImage,
    Sana,
    AuraFlow,
    HunyuanDiT,
    Kandinsky5,
    LtxVideo,
    Wan,
    PlainTorch,
)


def backend_of(pipe: Any) -> Backend:
    """Returns the backend of a pipeline.

    Args:
        pipe: The host's pipeline object.

    Raises:
        UnsupportedBackendError: No family knows this object; says what was looked for and what was found.
    """
    for family in _FAMILIES:
        if family.detect(pipe):
            return family(pipe)
    names = [f"{part}{number}" for part in ("unet", "transformer", "text_encoder", "tokenizer") for number in _NUMBERS]
    parts = [f"{name}: {type(part).__name__}" for name in names if (part := getattr(pipe, name, None)) is not None]
    looked_for = "; ".join(family.looked_for for family in _FAMILIES)
    raise UnsupportedBackendError(
        f"{type(pipe).__name__} is not a pipeline that safegen can guard. Looked for: {looked_for}. Found: "
        f"{', '.join(parts) or 'none of these parts'}. docs/support.md says what is guarded, and how."
    )
