"""What each rule of a policy comes to with the defaults filled in, and which concepts it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safegen.errors import PolicyConflictError, did_you_mean
from safegen.policy.catalogue import Catalogue, Concept
from safegen.policy.document import Loc
from safegen.policy.schema import Policy, Transport

RULE_FIELDS = ("action", "severity", "strength", "on_missing", "applies_to")
TRANSPORT_FIELDS = tuple(Transport.model_fields)


@dataclass(frozen=True, slots=True)
class Setting:
    """A value that holds, and the path where it is stated (or would be)."""

    value: Any
    loc: Loc


@dataclass(frozen=True, slots=True)
class Taken:
    """A concept and the rule that takes it: `index` in the policy, `id` with the concept's where it is a category's."""

    concept: Concept
    index: int
    id: str


def rule_settings(policy: Policy, index: int) -> Mapping[str, Setting]:
    """Returns what decides in a rule, by field name; those of its transport as `transport.lo`."""
    rule, defaults = policy.rules[index], policy.defaults
    found = {name: Setting(getattr(rule, name), ("rules", index, name)) for name in RULE_FIELDS}
    if rule.on_missing is None:
        found["on_missing"] = Setting(defaults.on_missing, ("defaults", "on_missing"))
    for name in TRANSPORT_FIELDS:
        own = rule.transport is not None and name in rule.transport.model_fields_set
        loc: Loc = ("rules", index, "transport", name) if own else ("defaults", "transport", name)
        found[f"transport.{name}"] = Setting(getattr(rule.transport if own else defaults.transport, name), loc)
    return found


def policy_settings(policy: Policy) -> Mapping[str, Setting]:
    """Returns what decides outside of rules, by dotted name."""
    found = {
        "mode": policy.mode,
        "defaults.on_unknown": policy.defaults.on_unknown,
        "defaults.sentence_encoder": policy.defaults.sentence_encoder,
    }
    found |= {f"audit.{name}": getattr(policy.audit, name) for name in type(policy.audit).model_fields}
    return {name: Setting(value, tuple(name.split("."))) for name, value in found.items()}


def taken(policy: Policy, catalogue: Catalogue) -> list[Taken]:
    """Returns which rule takes which concept, in rule order; a concept belongs to the rule that names it most closely.

    A rule that names a concept takes it away from `<category>/*` rules, and `explicit/nudity/*` from `explicit/*`.

    Raises:
        PolicyConflictError: A rule names a concept that the catalogue lacks, or a category without concepts.
    """
    closest: dict[str, tuple[int, int]] = {}
    selections: list[tuple[Concept, ...]] = []
    for index, rule in enumerate(policy.rules):
        selected = catalogue.select(rule.concept)
        if not selected:
            raise PolicyConflictError(
                f"{policy.metadata.id}: rule {rule.id!r} names concept {rule.concept!r}, which the catalogue lacks."
                f"{did_you_mean(rule.concept, catalogue.concepts)}"
            )
        selections.append(selected)
        depth = rule.concept.count("/") if rule.concept.endswith("/*") else 9
        for concept in selected:
            if depth > closest.get(concept.id, (0, 0))[0]:
                closest[concept.id] = (depth, index)
    return [
        Taken(concept, index, rule.id if rule.concept == concept.id else f"{rule.id}/{concept.id}")
        for index, (rule, selected) in enumerate(zip(policy.rules, selections, strict=True))
        for concept in selected
        if closest[concept.id][1] == index
    ]
