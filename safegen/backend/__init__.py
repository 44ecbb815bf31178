"""The host: finding its parts, attaching membranes to its denoiser, reading its conditioning."""

from __future__ import annotations

from typing import Any

from safegen.backend.base import Backend
from safegen.backend.families.sd import StableDiffusion
from safegen.errors import UnsupportedBackendError

__all__ = ["Backend", "backend_of"]

_FAMILIES: tuple[type[StableDiffusion], ...] = (StableDiffusion,)


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
    parts = [
        f"{name}: {type(part).__name__}"
        for name in ("unet", "transformer", "text_encoder", "text_encoder_2", "tokenizer")
        if (part := getattr(pipe, name, None)) is not None
    ]
    raise UnsupportedBackendError(
        f"{type(pipe).__name__} is not a pipeline that safegen can guard. Looked for: a `unet` "
        "(UNet2DConditionModel) with one `text_encoder` (CLIPTextModel) and a `tokenizer` (Stable Diffusion 1.x, 2.x "
        f"and models of the same architecture). Found: {', '.join(parts) or 'none of these parts'}."
    )
