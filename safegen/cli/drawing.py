"""Drawing many prompts with a pipeline, one batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegen.cli.options import writing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Drawing:
    """How images are drawn.

    Attributes:
        seed: Seed of the first prompt's noise; prompt k starts from `seed + k`, whatever the batches.
        steps: Sampler steps.
        guidance: Guidance scale; None for the pipeline's own.
        negative: Negative prompt of all images.
        batch: Images at a time.
    """

    seed: int
    steps: int = 25
    guidance: float | None = None
    negative: str | None = None
    batch: int = 8


def draw(pipe: Any, prompts: Sequence[str], how: Drawing) -> Iterator[Tensor]:
    """Draws one image per prompt.

    Args:
        pipe: The pipeline.
        prompts: At least one.
        how: The settings.

    Yields:
        Images of one batch after the other, [n, 3, h, w] in [0, 1].
    """
    import torch

    settings: dict[str, Any] = {"num_inference_steps": how.steps, "output_type": "pt"}
    if how.guidance is not None:
        settings["guidance_scale"] = how.guidance
    for start in range(0, len(prompts), how.batch):
        part = list(prompts[start : start + how.batch])
        if how.negative is not None:
            settings["negative_prompt"] = [how.negative] * len(part)
        generators = [torch.Generator().manual_seed(how.seed + start + k) for k in range(len(part))]
        yield pipe(part, generator=generators, **settings).images.float().cpu()


def picture(image: Tensor) -> Image:
    """Returns an image [3, h, w] in [0, 1] as PIL picture: the pixels whose digest the audit log holds."""
    import torch
    from PIL import Image

    pixels = image.permute(1, 2, 0).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def save_picture(image: Image, path: Path) -> None:
    """Writes a PNG; a stop leaves the whole file or none.

    Raises:
        UsageError: The file could not be written.
    """
    draft = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            image.save(draft, "PNG")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
