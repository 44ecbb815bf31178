"""Loading pipelines from folders and hubs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safegen.errors import UnsupportedBackendError, UsageError


@contextmanager
def quiet_loading() -> Generator[None]:
    """Keeps the loaders' own progress bars off the screen, and restores the setting afterwards."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    bars = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in bars:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in bars:
            module.enable_progress_bar()


def load_pipeline(model: str, *, revision: str | None = None, text_only: bool = False) -> Any:
    """Loads a diffusers pipeline.

    Args:
        model: "mini" for the embedded model, a pipeline folder, or a hub id ("owner/name").
        revision: A pinned commit, for a hub id.
        text_only: Whether the denoiser has its shapes and no values, and there is no autoencoder: enough to decide on
            prompts, and a small part of the weights.

    Raises:
        UsageError: Not a pipeline folder, or the hub could not be read (`HF_HUB_OFFLINE` is honoured).
        UnsupportedBackendError: The folder holds a pipeline class that diffusers does not know.
    """
    if model == "mini":
        from safegen import mini

        if not text_only:
            return mini.load()
        model = str(mini.folder())
    from diffusers import DiffusionPipeline

    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageError(
            f"{model}: not a pipeline folder, it holds no model_index.json; expected a folder that save_pretrained "
            'wrote, a hub id, or "mini"'
        )
    try:
        with quiet_loading():
            given = _without_pictures(model, revision) if text_only else {}
            pipe = DiffusionPipeline.from_pretrained(model, revision=revision, use_safetensors=True, **given)
    except AttributeError as error:
        raise UnsupportedBackendError(f"{model}: {error}") from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f'{model}: no pipeline could be loaded ({error}); expected a pipeline folder, a hub id, or "mini"'
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _without_pictures(model: str, revision: str | None) -> dict[str, Any]:
    """Returns what stands in for the parts of a pipeline that only draw."""
    import torch
    from diffusers import UNet2DConditionModel

    config: Any = UNet2DConditionModel.load_config(model, subfolder="unet", revision=revision)
    with torch.device("meta"):
        denoiser = UNet2DConditionModel.from_config(config)
    return {"unet": denoiser, "vae": None, "safety_checker": None, "feature_extractor": None}
