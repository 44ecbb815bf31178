"""From an exception to one clear message on stderr and an exit code (docs: exit codes in `safegen --help`)."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import typer

from safegen.cli.render import fail, show_traceback
from safegen.errors import PolicyValidationError, SafegenError

INTERNAL = 5

debug: ContextVar[bool] = ContextVar("safegen_debug", default=False)


@contextmanager
def reported() -> Generator[None]:
    """Turns what a command raises into a message and an exit code; use it as a decorator of the command."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # typer's own business
        raise
    except Exception as error:
        if debug.get():
            show_traceback(traceback.format_exc())
        fail(_message(error))
        raise typer.Exit(error.exit_code if isinstance(error, SafegenError) else INTERNAL) from error


def _message(error: Exception) -> str:
    if isinstance(error, PolicyValidationError):
        count = len(error.problems)
        return f"{count} fault{'s' if count != 1 else ''} in the policy:\n{error}"
    if isinstance(error, SafegenError):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first} (`safegen --debug …` or SAFEGEN_DEBUG=1 shows where)"
