"""safegen-mini: a small trained text-to-image model that ships with safegen, and its independent judge.

A stock Stable Diffusion pipeline folder (CLIP text model, U-Net, AutoencoderKL, DDIM) that draws 134 objects in six
styles at 64×64. It exists so that policies, membranes and audits can be tried, tested and measured offline.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safegen.errors import SafegenError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from safegen.mini.judge import Judge

__all__ = ["folder", "load", "load_judge"]

_HERE = Path(__file__).resolve().parent


def folder() -> Path:
    """Returns the folder that `StableDiffusionPipeline.from_pretrained` loads.

    Raises:
        SafegenError: The weights are not in this installation.
    """
    found = _HERE / "weights"
    if not (found / "model_index.json").is_file():
        raise SafegenError(
            f"{found}: the weights of safegen-mini are missing from this installation; install the wheel again, or "
            "rebuild them with `python -m safegen.mini.build`"
        )
    return found


def load() -> StableDiffusionPipeline:
    """Loads safegen-mini in float32, without a progress bar."""
    from diffusers import StableDiffusionPipeline

    from safegen.backend.loading import quiet_loading

    with quiet_loading():
        pipe = StableDiffusionPipeline.from_pretrained(folder(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_judge() -> Judge:
    """Loads the independent judge: it names the object and the style of a picture."""
    from safegen.mini.judge import Judge

    return Judge.load(_HERE / "judge_weights")
