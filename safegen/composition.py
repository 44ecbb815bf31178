"""How a policy's membranes are composed: opened per row as prompts ask for it, or merged once for every row."""

from __future__ import annotations

from typing import Literal, get_args

from safegen.backend.injection import Injection
from safegen.errors import InjectionError, UsageError
from safegen.gatekeeper import Gatekeeper
from safegen.policy.fields import TASKS
from safegen.policy.resolve import ResolvedPolicy, ResolvedRule

Composition = Literal["runtime", "static", "auto"]


def compose(injection: Injection, gatekeeper: Gatekeeper, composition: Composition) -> None:
    """Merges membranes where `composition` asks for it; otherwise they stay to be opened per row.

    Args:
        injection: The planned attachment.
        gatekeeper: What decides how far the membranes open.
        composition: `runtime` merges nothing; `static` merges; `auto` merges where that changes no decision.

    Raises:
        UsageError: No such composition, or `static` where something opens by prompt.
        UnsupportedBackendError, AttestationError: `static`, and the denoiser cannot carry merged weights.
    """
    if composition not in get_args(Composition):
        raise UsageError(f"composition: expected one of {', '.join(get_args(Composition))}, found {composition!r}")
    if composition == "runtime":
        return
    reason = _what_varies(gatekeeper)
    if reason is not None:
        if composition == "static":
            raise UsageError(f'composition="static": {reason}. Use composition="runtime" (or "auto").')
        return
    try:
        injection.merge(gatekeeper.strengths)
    except InjectionError:
        if composition == "static":
            raise


def _what_varies(gatekeeper: Gatekeeper) -> str | None:
    """Returns why the membranes are not open in full for every row; None where they are."""
    policy = gatekeeper.policy
    if policy.mode != "enforce":
        return f"policy {policy.id!r} is in mode {policy.mode}, in which no membrane acts; expected mode enforce"
    for item in gatekeeper.installed:
        found = _transport(item.rule) or _callers(item.rule, policy)
        if found is not None:
            return (
                f"merged weights act on every row alike, and rule {item.rule.id!r} {found}; expected "
                "transport: {score: always, guidance: both}, every task and no exception for every rule that erases"
            )
    return None


def _transport(rule: ResolvedRule) -> str | None:
    if "always" not in rule.transport.score and rule.transport.least < 1:
        return f"opens as far as a prompt asks (score {', '.join(rule.transport.score)})"
    if rule.transport.guidance != "both":
        return f"leaves unconditional rows shut (guidance {rule.transport.guidance})"
    return None


def _callers(rule: ResolvedRule, policy: ResolvedPolicy) -> str | None:
    for exception in policy.exceptions:
        if rule.id in exception.rules:
            return f"is another one for the callers of exception {exception.stated.id!r}"
    if set(rule.applies_to) != set(TASKS):
        return f"holds for {', '.join(rule.applies_to)} only"
    return None
