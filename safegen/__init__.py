"""safegen keeps image generators inside a content-safety policy.

    guard = safegen.apply_policy(pipe, "strict")

Importing it costs nothing: every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from safegen._version import __version__

if TYPE_CHECKING:
    from safegen.audit import AuditLog, verify
    from safegen.errors import PromptRefused, SafegenError
    from safegen.gatekeeper import Activation, Decision
    from safegen.guard import Guard, apply_policy
    from safegen.membrane.file import read_membrane, write_membrane
    from safegen.membrane.weights import Membrane
    from safegen.policy.context import request_context
    from safegen.policy.load import load_policy

__all__ = [
    "Activation",
    "AuditLog",
    "Decision",
    "Guard",
    "Membrane",
    "PromptRefused",
    "SafegenError",
    "__version__",
    "apply_policy",
    "load_policy",
    "read_membrane",
    "request_context",
    "verify",
    "write_membrane",
]

_HOMES = {
    "Activation": "safegen.gatekeeper",
    "AuditLog": "safegen.audit",
    "Decision": "safegen.gatekeeper",
    "Guard": "safegen.guard",
    "Membrane": "safegen.membrane.weights",
    "PromptRefused": "safegen.errors",
    "SafegenError": "safegen.errors",
    "apply_policy": "safegen.guard",
    "load_policy": "safegen.policy.load",
    "read_membrane": "safegen.membrane.file",
    "request_context": "safegen.policy.context",
    "verify": "safegen.audit",
    "write_membrane": "safegen.membrane.file",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from its home (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'safegen' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    """Lists the public names."""
    return sorted(__all__)
