"""Loading the model for a command: where everything heavy is imported, without the libraries' chatter."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegen.cli.options import MINI
from safegen.cli.render import say
from safegen.errors import BaseModelMismatchError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from safegen.backend.sites import Sites
    from safegen.membrane.formats import Component
    from safegen.membrane.order import Host
    from safegen.membrane.weights import Membrane


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that a file was made for: its family, its denoiser (maybe without values), where its sites are."""

    family: str
    denoiser: nn.Module
    sites: Sites

    @property
    def component(self) -> Component:
        """What LoRA files call the denoiser."""
        from diffusers import UNet2DConditionModel

        return "unet" if isinstance(self.denoiser, UNet2DConditionModel) else "transformer"

    def walk(self) -> Host:
        """Returns what numbered tensors are placed with."""
        from safegen.membrane.order import Host

        return Host(self.denoiser, self.sites.modules)

    def names(self, membrane: Membrane) -> dict[str, str]:
        """Checks a membrane against this model; returns the site name of each of its keys.

        Raises:
            BaseModelMismatchError, NoMatchingSiteError, ShapeMismatchError: It was made for another one.
        """
        from safegen.backend.sites import plan

        if membrane.base and membrane.base != self.family:
            raise BaseModelMismatchError(
                f"membrane {membrane.concept!r} was made for base {membrane.base!r}, --base is {self.family!r}; give "
                "the model that it was made for"
            )
        return plan(membrane, self.sites, self.family)


@contextmanager
def _quiet_libraries() -> Generator[None]:
    """Holds back warnings that say nothing to users of the command line (missing torchvision, cache look-ups).

    Only while importing and loading: what these libraries say about a prompt (that it was cut, say) is kept.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    levels = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    for module, _ in levels:
        module.set_verbosity_error()
    try:
        yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)


def load_host(model: str, revision: str | None = None, *, text_only: bool = False) -> Any:
    """Loads a pipeline, and with it all that safegen needs to guard it.

    Args:
        model: "mini", a pipeline folder, or a hub id.
        revision: A pinned commit, for a hub id.
        text_only: Whether only what decides on prompts is loaded; nothing can be drawn then.

    Raises:
        UsageError, UnsupportedBackendError: See `safegen.backend.loading.load_pipeline`.
    """
    say(f"loading {model} …")
    with _quiet_libraries():
        import safegen.guard  # noqa: F401  # pyright: ignore[reportUnusedImport] - imported here to be quiet
        from safegen.backend.loading import load_pipeline

        return load_pipeline(model, revision=revision, text_only=text_only)


def needs_no_folder(base: str) -> bool:
    """Tells whether `load_base` knows the sites of a base by its name alone."""
    with _quiet_libraries():
        from safegen.backend.blank import BLANK_FAMILIES

    return base in (*BLANK_FAMILIES, MINI)


def load_base(base: str) -> BaseModel:
    """Returns the sites of a base model; of the known families without any weights.

    Args:
        base: "sd1", "sd2", "sdxl", "mini", or a pipeline folder.

    Raises:
        UsageError: Neither a family nor a folder.
        UnsupportedBackendError: The folder holds another pipeline than safegen can guard.
    """
    with _quiet_libraries():
        from safegen.backend import backend_of
        from safegen.backend.blank import BLANK_FAMILIES, blank_denoiser

        if base in BLANK_FAMILIES:
            return BaseModel(base, *blank_denoiser(base))
        if base != MINI and not Path(base).is_dir():
            known = (*BLANK_FAMILIES, MINI)
            raise UsageError(
                f"--base {base}: neither a base family nor a pipeline folder.{did_you_mean(base, known)} Or give the "
                "folder of the pipeline that the file was made for"
            )
    backend = backend_of(load_host(base))
    return BaseModel(backend.family, backend.denoiser, backend.sites)
