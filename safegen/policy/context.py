"""Who asks, and when: what exceptions and `applies_to` are matched against."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, cast

from safegen.errors import UsageError, did_you_mean
from safegen.policy.fields import TASKS

TASK = "task"
"""The key of a context that says what kind of generation a run is; one of `safegen.policy.fields.TASKS`."""

Context = Mapping[str, str]

_request: ContextVar[Context | None] = ContextVar("safegen_request", default=None)


def utc_now() -> datetime:
    """Returns the time that exceptions are held against, where no other clock is given."""
    return datetime.now(UTC)


def checked(context: Mapping[str, Any]) -> Context:
    """Checks what a caller says about a request.

    Args:
        context: Names and texts, such as a tenant and a route; `task` is one of txt2img, img2img, inpaint, controlnet
            and video.

    Returns:
        A copy.

    Raises:
        UsageError: A name or a value is not text, or the task is unknown.
    """
    given = cast("Mapping[Any, Any]", context)
    for key, value in given.items():
        if not isinstance(key, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", key):
            raise UsageError(f"context: expected names such as tenant, found {key!r}; use lower-case letters")
        if not isinstance(value, str):
            raise UsageError(
                f"context[{key!r}]: expected text, found {type(value).__name__}; a value that is not known is left out"
            )
    if TASK in given and given[TASK] not in TASKS:
        raise UsageError(f"context['task']: unknown task {given[TASK]!r}.{did_you_mean(given[TASK], TASKS)}")
    return dict(given)


@contextmanager
def request_context(**context: str) -> Generator[None]:
    """Says who asks, for all that this thread or task draws inside of the block.

    It is added to the `context` that the policy was applied with, and to that of blocks around it.

    Args:
        context: Names and texts, such as `tenant="med-atlas"`; `task` says what kind of generation it is.

    Raises:
        UsageError: See `checked`.
    """
    token = _request.set({**current({}), **checked(context)})
    try:
        yield
    finally:
        _request.reset(token)


def current(base: Context) -> Context:
    """Returns the context of this thread or task: what was applied, and what `request_context` adds."""
    return {**base, **(_request.get() or {})}
