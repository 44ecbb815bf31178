"""Loading the model for a command: where everything heavy is imported, without the libraries' chatter."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from safegen.cli.render import say


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


def load_host(model: str, revision: str | None = None) -> Any:
    """Loads a pipeline, and with it all that safegen needs to guard it.

    Args:
        model: "mini", a pipeline folder, or a hub id.
        revision: A pinned commit, for a hub id.

    Raises:
        UsageError, UnsupportedBackendError: See `safegen.backend.loading.load_pipeline`.
    """
    say(f"loading {model} …")
    with _quiet_libraries():
        import safegen.guard  # noqa: F401  # pyright: ignore[reportUnusedImport] - imported here to be quiet
        from safegen.backend.loading import load_pipeline

        return load_pipeline(model, revision=revision)
