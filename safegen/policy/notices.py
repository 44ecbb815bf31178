"""What the person who applies a policy should read about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from safegen.policy.fields import TASKS
from safegen.policy.schema import Policy

if TYPE_CHECKING:
    from safegen.policy.resolve import ResolvedException, ResolvedRule

_SHOWN = 5  # ids that a notice spells out


def notices_of(
    policy: Policy,
    rules: Sequence[ResolvedRule],
    exceptions: Sequence[ResolvedException],
    base: str,
    now: datetime,
) -> tuple[str, ...]:
    """Returns sentences about what a policy does that its author might not expect.

    Args:
        policy: The policy.
        rules: What its rules come to for a caller without exceptions.
        exceptions: Its exceptions.
        base: ` for base family …`, or nothing.
        now: The time that exceptions are held against.
    """
    name = policy.metadata.id
    found = [*_mode(policy), *_missing(policy, rules, base), *_exceptions(policy, exceptions, now)]
    found += [f"looser than what it extends, at {text}" for text in policy.overrides]
    narrow = [rule.id for rule in policy.rules if set(rule.applies_to) < set(TASKS)]
    if narrow:
        found.append(
            f"rules that apply to some tasks only ({_shown(narrow)}) hold for every run whose caller does not state "
            "its task (context={'task': …})"
        )
    return tuple(f"{name}: {text}" for text in found)


def _mode(policy: Policy) -> Iterator[str]:
    if policy.mode == "disabled":
        yield "mode is disabled; nothing is refused, erased or flagged."
    if policy.mode == "observe":
        yield "mode is observe; what would be done is recorded and nothing else happens."


def _missing(policy: Policy, rules: Sequence[ResolvedRule], base: str) -> Iterator[str]:
    absent = [rule for rule in rules if rule.action == "erase" and not rule.has_membrane]
    erasing = sum(rule.effective == "erase" for rule in rules)
    would = "would be" if policy.mode != "enforce" else "are"
    for effective, verb in (("refuse", "refused"), ("flag", "flagged only")):
        ids = [rule.concept.id for rule in absent if rule.effective == effective]
        if ids:
            yield (
                f"{erasing} of {len(rules)} rules erase; {len(ids)} have no membrane{base}: "
                f"prompts that name these concepts {would} {verb} ({_shown(ids)})"
            )


def _exceptions(policy: Policy, exceptions: Sequence[ResolvedException], now: datetime) -> Iterator[str]:
    today = now.astimezone(UTC).date()
    over = [exception.stated for exception in exceptions if exception.expired(today)]
    if over:
        shown = _shown([f"{one.id} on {one.expires.isoformat()}, owner {one.owner}" for one in over], mark="; ")
        yield f"{len(over)} of {len(exceptions)} exceptions have expired and are ignored ({shown})"


def _shown(ids: Sequence[str], mark: str = ", ") -> str:
    return mark.join(ids[:_SHOWN]) + (f"{mark}…" if len(ids) > _SHOWN else "")
