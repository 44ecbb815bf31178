"""Whether one policy is at least as strict as another: what `extends` demands, and what `safegen diff` reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from safegen.policy.catalogue import Catalogue
from safegen.policy.document import Loc
from safegen.policy.fields import Severity
from safegen.policy.schema import Policy, PolicyException
from safegen.policy.settings import Setting, Taken, policy_settings, rule_settings, taken

_ASCENDING: Mapping[str, Sequence[object]] = {  # from mild to strict
    "mode": ("disabled", "observe", "enforce"),
    "defaults.on_unknown": ("open", "refuse"),
    "audit.on_failure": ("degrade", "refuse"),
    "audit.evidence": ("none", "opened"),
    "action": ("flag", "erase", "refuse"),
    "severity": tuple(Severity),
    "on_missing": ("flag", "refuse-prompts", "error"),
}
_HIGHER_IS_STRICTER = ("strength", "transport.least")
_LOWER_IS_STRICTER = ("transport.lo", "transport.hi")
_MORE_IS_STRICTER = ("transport.score", "applies_to")


@dataclass(frozen=True, slots=True)
class Looser:
    """Something that a policy demands less of than another.

    Attributes:
        field: Which setting; `concept` where a concept is left to no rule, `exception` for an exception.
        loc: Where the looser policy states it.
        rule: Index of the looser policy's rule that it is about; None for settings of the whole policy.
        message: What is looser, in words.
        exception: Index of the looser policy's exception that it is about.
        left: Id of the stricter policy's rule whose concepts no rule takes any more.
    """

    field: str
    loc: Loc
    rule: int | None
    message: str
    exception: int | None = None
    left: str | None = None


def as_strict(field: str, old: Any, new: Any) -> bool:
    """Tells whether a new value is at least as strict as the old one; values that cannot be compared must be equal.

    Args:
        field: Name of the setting, as `rule_settings` and `policy_settings` have it.
        old: Its value before.
        new: Its value now.
    """
    if old == new:
        return True
    if field in _ASCENDING:
        order = _ASCENDING[field]
        return order.index(new) > order.index(old)
    if field in _HIGHER_IS_STRICTER:
        return new > old
    if field in _LOWER_IS_STRICTER:
        return not isinstance(old, str) and not isinstance(new, str) and new < old
    if field in _MORE_IS_STRICTER:
        return set(new) >= set(old)
    return field == "defaults.sentence_encoder" and old is None


def looser(old: Policy, new: Policy, catalogue: Catalogue) -> list[Looser]:
    """Returns where a policy is not at least as strict as another; transitive: what is nowhere looser stays so.

    Args:
        old: What is demanded.
        new: What is offered.
        catalogue: The concepts that the rules of both name.

    Returns:
        One entry per setting, rule and field; empty where `new` is at least as strict for every concept and caller.
    """
    found = [*_whole(old, new), *_rules(old, new, catalogue), *_exceptions(old, new, catalogue)]
    return list(dict.fromkeys(found))


def _whole(old: Policy, new: Policy) -> Iterator[Looser]:
    before, after = policy_settings(old), policy_settings(new)
    for name, setting in after.items():
        if not as_strict(name, before[name].value, setting.value):
            yield Looser(name, setting.loc, None, _changed(name, before[name], setting, old))


def _rules(old: Policy, new: Policy, catalogue: Catalogue) -> Iterator[Looser]:
    covering = {one.concept.id: one.index for one in taken(new, catalogue)}
    numbers = {rule.id: index for index, rule in enumerate(new.rules)}
    compared: set[tuple[int, int]] = set()
    for one in taken(old, catalogue):
        rule = old.rules[one.index]
        index = covering.get(one.concept.id)
        if index is None:
            number = numbers.get(rule.id)
            loc: Loc = ("rules",) if number is None else ("rules", number, "concept")
            message = f"no rule takes {rule.concept!r} any more, as rule {rule.id!r} did"
            yield Looser("concept", loc, number, message, left=rule.id)
            continue
        if (one.index, index) in compared:
            continue
        compared.add((one.index, index))
        before, after = rule_settings(old, one.index), rule_settings(new, index)
        whose = f"rule {new.rules[index].id!r}: "
        if new.rules[index].id != rule.id:
            whose = f"rule {new.rules[index].id!r} takes {one.concept.id!r} from {rule.id!r}: "
        for name, setting in after.items():
            if as_strict(name, before[name].value, setting.value):
                continue
            message = _changed(name, before[name], setting, old)
            if setting.loc[0] == "defaults":  # one fault, whatever number of rules it is the default of
                yield Looser(name, setting.loc, None, f"defaults.{message}")
            else:
                yield Looser(name, setting.loc, index, whose + message)


def _exceptions(old: Policy, new: Policy, catalogue: Catalogue) -> Iterator[Looser]:
    # By concept, not by rule: a rule of one's own that takes over an inherited concept makes no room for an exception.
    if not new.exceptions:
        return
    before_taken, offered = taken(old, catalogue), taken(new, catalogue)
    demanded = {one.concept.id: old.rules[one.index].id for one in before_taken}
    known = {exception.id: exception for exception in old.exceptions}
    for index, exception in enumerate(new.exceptions):
        concepts = [c for c in excepted(exception, new, offered) if c in demanded]
        before = known.get(exception.id)
        allowed = set(excepted(before, old, before_taken)) if before is not None else set[str]()
        if not concepts or (before is not None and set(concepts) <= allowed and _narrower(before, exception)):
            continue
        what = "is new" if before is None else "allows more than before"
        message = f"exception {exception.id!r} from {concepts[0]!r} (rule {demanded[concepts[0]]!r}) {what}"
        yield Looser("exception", ("exceptions", index), None, message, index)


def excepted(exception: PolicyException, policy: Policy, offered: Sequence[Taken]) -> list[str]:
    """Returns the ids of the concepts that an exception is about, in rule order."""
    named = set(exception.rules)
    return [one.concept.id for one in offered if one.id in named or policy.rules[one.index].id in named]


def _narrower(old: PolicyException, new: PolicyException) -> bool:
    """Tells whether an exception allows nothing that the old one does not, for the same concepts."""
    return (
        new.expires <= old.expires
        and ("flag", "erase").index(new.action) >= ("flag", "erase").index(old.action)
        and all(key in new.when and set(new.when[key]) <= set(values) for key, values in old.when.items())
    )


def _changed(name: str, before: Setting, after: Setting, old: Policy) -> str:
    comparable = as_strict(name, after.value, before.value)
    how = "is looser than" if comparable else "cannot be held against"
    return f"{name} {said(after.value)} {how} {said(before.value)} ({old.where(before.loc)})"


def said(value: object) -> str:
    """Returns a setting's value in words, as a policy file has it."""
    if isinstance(value, Severity):
        return value.value
    if isinstance(value, tuple):
        return f"[{', '.join(cast('tuple[str, ...]', value))}]"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
