"""What is observed of a pipeline beside its denoiser: the texts it encodes, and the images it draws.

What must not be got round is attached to the denoiser and the text encoder themselves, which pipelines share when they
are rebuilt (`from_pipe`). These two add what only the pipeline and its autoencoder can tell; each call of
`encode_prompt`, with which every run begins, is also the moment to prove that the guarded parts are still the ones that
the pipeline will run.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safegen.backend.conditioning import TextSeam


class _MethodWatch:
    """Stands in for one method of one object, as an attribute of the instance."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._base: Callable[..., Any] = getattr(owner, name)
        self._had = owner.__dict__.get(name)

    def attach(self) -> None:
        """Starts to watch."""
        self._owner.__dict__[self._name] = self

    def detach(self) -> None:
        """Stops; the object is as before. Leaves a stand-in that somebody else has put in place since."""
        if self._owner.__dict__.get(self._name) is not self:
            return
        if self._had is None:
            del self._owner.__dict__[self._name]
        else:
            self._owner.__dict__[self._name] = self._had


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [v for v in value if isinstance(v, str)] if isinstance(value, list | tuple) else []


class EncodePromptWatch(_MethodWatch):
    """Tells the text seam which texts `pipe.encode_prompt` encodes, and which rows it returns as negative prompts."""

    def __init__(self, pipe: Any, seam: TextSeam, prove: Callable[[], None]) -> None:
        super().__init__(pipe, "encode_prompt")
        self._seam = seam
        self._prove = prove
        self._signature = inspect.signature(self._base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Proves that the guard is in place, then runs `encode_prompt` with its texts announced."""
        self._prove()
        given = self._signature.bind(*args, **kwargs).arguments
        negatives = _texts(given.get("negative_prompt")) or [""]
        token = self._seam.announce([*negatives, *_texts(given.get("prompt"))])
        try:
            result = self._base(*args, **kwargs)
            if isinstance(result, tuple) and len(result) == 2:
                self._seam.returned(*result)
            return result
        finally:
            self._seam.end_announcement(token)


def image_digests(decoded: Tensor) -> tuple[str, ...]:
    """Returns the sha256 of each image's RGB bytes, as the pipeline hands them out.

    Args:
        decoded: What the autoencoder decoded, [n, 3, h, w], in [-1, 1].

    Returns:
        Hex digests, equal to `sha256(image.convert("RGB").tobytes())` of the pipeline's PIL images.
    """
    images = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu()
    pixels = images.mul(255).round().to(torch.uint8).numpy()
    return tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in pixels)


class ImageWatch(_MethodWatch):
    """Hands the digests of decoded images on."""

    def __init__(self, pipe: Any, drawn: Callable[[tuple[str, ...]], None]) -> None:
        super().__init__(pipe.vae, "decode")
        self._drawn = drawn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `decode`, then reports the images."""
        output = self._base(*args, **kwargs)
        sample = output[0] if isinstance(output, tuple) else output.sample
        self._drawn(image_digests(sample.detach()))
        return output
