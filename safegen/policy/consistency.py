"""Faults between fields of one policy document, found on plain values so that each can be shown where it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, cast

from safegen.errors import did_you_mean
from safegen.policy.document import Loc

_MILDER = ("flag", "erase", "refuse")


def consistency_faults(document: Mapping[str, Any]) -> list[tuple[Loc, str]]:
    """Returns the faults between fields of a policy document, as paths and messages.

    Args:
        document: The document as plain values, with what it extends filled in; parts with other faults are passed over.

    Returns:
        Missing rules, ids used twice, concepts named by two rules, thresholds that do not go together, a score without
        its encoder, a degradable audit in mode enforce, exceptions from no rule or without effect, and an `override`
        without its reason.
    """
    found = chain(
        _rule_faults(document),
        _transport_faults(document),
        _exception_faults(document),
        _override_faults(document),
        _audit_faults(document),
    )
    return list(found)


def is_threshold(value: object) -> bool:
    """Tells whether a value is a number in [-1, 1]."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= 1


def _rule_faults(document: Mapping[str, Any]) -> Iterator[tuple[Loc, str]]:
    if "rules" not in document and not document.get("extends"):
        yield (), "missing key 'rules'; a policy has rules, or extends one that has"
    rules = list(entries(document, "rules"))
    for key, message in (("id", "rule id {0!r} is used twice"), ("concept", "concept {0!r} has rule {1!r} already")):
        seen: dict[str, object] = {}
        for index, rule in rules:
            name = rule.get(key)
            if not isinstance(name, str):
                continue
            if name in seen:
                yield ("rules", index, key), message.format(name, seen[name])
            seen.setdefault(name, rule.get("id"))


def _transport_faults(document: Mapping[str, Any]) -> Iterator[tuple[Loc, str]]:
    """Yields the faults of `defaults.transport`, and of each rule's once the defaults are filled in."""
    defaults = mapping(document, "defaults")
    common = mapping(defaults, "transport")
    own = [(("rules", index, "transport"), mapping(rule, "transport")) for index, rule in entries(document, "rules")]
    places: list[tuple[Loc, dict[str, Any]]] = [(("defaults", "transport"), common), *own]
    for place, given in places:
        if not given:
            continue
        chosen = common | given
        lo, hi = chosen.get("lo", "calibrated"), chosen.get("hi", "calibrated")
        numbers = [is_threshold(value) for value in (lo, hi)]
        if any(numbers) and "calibrated" in (lo, hi):
            yield place, f"lo is {lo} and hi is {hi}: expected two numbers, or calibrated for both"
        elif all(numbers) and lo > hi:
            yield place, f"lo is {lo}, above hi, which is {hi}; expected lo not above hi"
        score = chosen.get("score")
        if isinstance(score, str | list | tuple) and "semantic" in score and not defaults.get("sentence_encoder"):
            yield (
                place,
                "the score semantic needs defaults.sentence_encoder: a model folder, or a hub id with its commit",
            )


def _exception_faults(document: Mapping[str, Any]) -> Iterator[tuple[Loc, str]]:
    rules = {rule["id"]: rule for _, rule in entries(document, "rules") if isinstance(rule.get("id"), str)}
    seen: set[str] = set()
    for index, exception in entries(document, "exceptions"):
        name = exception.get("id")
        if isinstance(name, str) and name in seen:
            yield ("exceptions", index, "id"), f"exception id {name!r} is used twice"
        seen |= {name} if isinstance(name, str) else set()
        action: Any = exception.get("action")
        for k, target in enumerate(texts(exception.get("rules"))):
            where = ("exceptions", index, "rules", k)
            rule = rules.get(target.split("/")[0])
            if rule is None:
                yield where, f"unknown rule {target!r}.{did_you_mean(target, rules)}"
                continue
            asked: Any = rule.get("action", "erase")
            if action in _MILDER and asked in _MILDER and _MILDER.index(action) >= _MILDER.index(asked):
                yield (
                    ("exceptions", index, "action"),
                    f"{action} excepts nothing from {rule['id']!r}, whose action is {asked}; choose a milder one",
                )


def _override_faults(document: Mapping[str, Any]) -> Iterator[tuple[Loc, str]]:
    extends = bool(document.get("extends"))
    whole: list[tuple[Loc, Mapping[str, Any]]] = [((), document)]
    rules: list[tuple[Loc, Mapping[str, Any]]] = [(("rules", k), rule) for k, rule in entries(document, "rules")]
    exceptions = [(("exceptions", k), item) for k, item in entries(document, "exceptions") if item.get("override")]
    for loc, part in (*whole, *rules):
        reason: Any = part.get("reason")
        if part.get("override") is True and not (isinstance(reason, str) and reason.strip()):
            yield (*loc, "override"), "override: true needs a reason beside it: why may this be looser than the parent?"
        if reason and part.get("override") is not True:
            yield (*loc, "reason"), "reason goes with override: true; use description for anything else"
    for loc, part in (*whole, *rules, *exceptions):
        if part.get("override") is True and not extends:
            yield (*loc, "override"), "override goes with extends; there is no parent to override here"


def _audit_faults(document: Mapping[str, Any]) -> Iterator[tuple[Loc, str]]:
    if document.get("mode", "enforce") == "enforce" and mapping(document, "audit").get("on_failure") == "degrade":
        text = "degrade does not go with mode enforce: what is not recorded must not be drawn; use refuse"
        yield ("audit", "on_failure"), text


def entries(document: Mapping[str, Any], key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the entries of a list that are mappings, with their numbers."""
    found: Any = document.get(key)
    for index, entry in enumerate(cast("list[Any]", found) if isinstance(found, list) else []):
        if isinstance(entry, dict):
            yield index, cast("dict[str, Any]", entry)


def mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns the mapping under a key; an empty one where there is none."""
    found: Any = document.get(key)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def texts(value: object) -> list[str]:
    """Returns the texts of a list, or of one text that stands without a list."""
    if isinstance(value, str):
        return [value]
    return [entry for entry in cast("list[Any]", value) if isinstance(entry, str)] if isinstance(value, list) else []
