"""What is observed of a pipeline beside its denoiser: the texts it encodes, and the images it draws.

What must not be got round is attached to the denoiser and the text encoder themselves, which pipelines share when they
are rebuilt (`from_pipe`). These add what only the pipeline and its autoencoder can tell; each call of
`encode_prompt`, with which every run begins, is also the moment to prove that the guarded parts are still the ones that
the pipeline will run.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from safegen.backend.base import Input, Strand
from safegen.backend.conditioning import Encoding, TextSeam
from safegen.backend.standin import StandIn

_NUMBERS = ("", "_2", "_3", "_4")  # of the arguments of pipelines with several text encoders

Returned = Callable[[Any], tuple[Sequence[Strand], Sequence[Strand]]]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [v for v in value if isinstance(v, str)] if isinstance(value, list | tuple) else []


def _said(given: Mapping[str, Any], name: str) -> list[tuple[str, ...]]:
    """Returns the texts of each prompt: that of the first text encoder, and those of the others where they differ."""
    columns = [_texts(given.get(f"{name}{number}")) for number in _NUMBERS]
    first, *others = columns
    return [(text, *(more[k] for more in others if k < len(more))) for k, text in enumerate(first)]


class PartsWatch:
    """Knows which parts of a pipeline were guarded."""

    def __init__(self, pipe: Any, parts: Mapping[str, Any]) -> None:
        self._pipe, self._parts = pipe, parts

    def replaced(self) -> list[str]:
        """Returns the names of parts in whose place there is another one now."""
        now = {name: getattr(self._pipe, name, None) for name in self._parts}
        # A compiled part is still the same part.
        return [name for name, part in now.items() if getattr(part, "_orig_mod", part) is not self._parts[name]]

    def on_copy(self, pipe: Any, memo: dict[int, Any]) -> PartsWatch:
        """Returns the same for a deep copy of the pipeline, whose parts are copies of the parts."""
        return PartsWatch(pipe, {name: memo.get(id(part), part) for name, part in self._parts.items()})


class EncodePromptWatch(StandIn):
    """Tells the text seam which texts `pipe.encode_prompt` encodes, and which rows it returns as negative prompts."""

    def __init__(
        self,
        pipe: Any,
        parts: PartsWatch,
        seam: TextSeam,
        prove: Callable[[Sequence[str]], None],
        read: Returned,
    ) -> None:
        """Prepares to watch.

        Args:
            pipe: The pipeline.
            parts: Its parts, which must be the ones that were guarded.
            seam: What is told.
            prove: Called before each encoding with the names of parts that were replaced; raises where the guard is
                not in place.
            read: Finds the prompts and the negative prompts in what `encode_prompt` returned.
        """
        super().__init__(pipe, "encode_prompt")
        self._read = read
        self._parts = parts
        self._seam = seam
        self._prove = prove
        self._signature = inspect.signature(self._base)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """See `StandIn`."""
        twin = super().__deepcopy__(memo)
        twin._parts = self._parts.on_copy(twin._owner, memo)
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Proves that the guard is in place, then runs `encode_prompt` with its texts announced."""
        if not self._active:
            return self._base(*args, **kwargs)
        self._prove(self._parts.replaced())
        given = self._signature.bind(*args, **kwargs).arguments
        token = self._seam.announce(_said(given, "prompt"), _said(given, "negative_prompt"))
        try:
            result = self._base(*args, **kwargs)
            self._seam.returned(*self._read(result))
            return result
        finally:
            self._seam.end_announcement(token)


@dataclass(frozen=True, slots=True)
class Start:
    """What the images of a run begin from.

    Attributes:
        seeds: Of the caller's generators: one for all images, or one per image; none where none was given.
        inputs: `image`, and `mask` where a part of it is kept.
        seen: The last encoding in this thread at that moment, which tells the run that it belongs to.
    """

    seeds: tuple[int, ...] = ()
    inputs: tuple[Input, ...] = ()
    seen: Encoding | None = None


_NOTHING = Start()
_start: ContextVar[Start] = ContextVar("safegen_start", default=_NOTHING)


def take_start(seen: Encoding) -> Start:
    """Returns what the run begins from whose prompts were encoded as `seen`, once; nothing where that was not seen."""
    start = _start.get()
    _start.set(_NOTHING)
    return start if start.seen is seen else _NOTHING


class LatentsWatch(StandIn):
    """Notes the seeds and images that `pipe.prepare_latents` makes the first latents from."""

    def __init__(self, pipe: Any, seam: TextSeam) -> None:
        super().__init__(pipe, "prepare_latents")
        self._seam = seam
        self._signature = inspect.signature(self._base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `prepare_latents`, and notes its arguments."""
        if self._active:
            given = self._signature.bind(*args, **kwargs).arguments
            generators = given.get("generator")
            listed = generators if isinstance(generators, list) else [generators]
            seeds = tuple(g.initial_seed() for g in listed if isinstance(g, torch.Generator))
            inputs: tuple[Input, ...] = ()
            if given.get("image") is not None:
                inputs = ("image", "mask") if hasattr(self._owner, "prepare_mask_latents") else ("image",)
            _start.set(Start(seeds, inputs, self._seam.last()))
        return self._base(*args, **kwargs)


def image_digests(decoded: Tensor) -> tuple[str, ...]:
    """Returns the sha256 of each image's RGB bytes, as the pipeline hands them out.

    Args:
        decoded: What the autoencoder decoded, [n, 3, h, w] or, of videos, [n, 3, frames, h, w]; in [-1, 1].

    Returns:
        Hex digests, equal to `sha256(image.convert("RGB").tobytes())` of the pipeline's PIL images; of a video, that of
        its frames one after the other.
    """
    images = (decoded * 0.5 + 0.5).clamp(0, 1).movedim(1, -1).float().cpu()
    pixels = images.mul(255).round().to(torch.uint8).numpy()
    return tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in pixels)


class ImageWatch(StandIn):
    """Hands the digests of decoded images on."""

    def __init__(self, pipe: Any, drawn: Callable[[tuple[str, ...]], None]) -> None:
        super().__init__(pipe.vae, "decode")
        self._drawn = drawn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `decode`, then reports the images."""
        output = self._base(*args, **kwargs)
        if not self._active:
            return output
        sample = output[0] if isinstance(output, tuple) else output.sample
        self._drawn(image_digests(sample.detach()))
        return output
