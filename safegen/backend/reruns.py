"""Blocks that a host runs again (gradient checkpointing), or leaves out by design (step caches)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from safegen.backend.attachment import Opening, current


@contextmanager
def recomputed(denoiser: nn.Module, opening: Opening) -> Generator[None]:
    """Lets gradient checkpointing, which runs blocks again in the backward pass, run them with this opening."""
    modules: list[Any] = list(denoiser.modules())
    saving: list[tuple[Any, Callable[..., Any]]] = [
        (module, module._gradient_checkpointing_func)
        for module in modules
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    ]

    def remembering(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*inputs: Any, **options: Any) -> Any:
                token = current.set(opening)
                try:
                    return function(*inputs, **options)
                finally:
                    current.reset(token)

            return checkpoint(again, *args, **kwargs)

        return call

    for module, checkpoint in saving:
        module._gradient_checkpointing_func = remembering(checkpoint)
    try:
        yield
    finally:
        for module, checkpoint in saving:
            module._gradient_checkpointing_func = checkpoint


def cached(denoiser: nn.Module, sites: set[str]) -> set[str]:
    """Returns which of these sites lie below a diffusers cache hook, which skips them by design in later steps.

    What such a cache hands out was computed in an earlier step; that it was computed with the same opening is for the
    caller to know.
    """
    cached = [
        name
        for name, module in denoiser.named_modules()
        if any(hook._is_stateful for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values())
    ]
    return {site for site in sites if any(not name or site == name or site.startswith(f"{name}.") for name in cached)}
