"""What is different between two policies, in words, and which way it goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from safegen.policy.catalogue import Catalogue
from safegen.policy.schema import Policy, PolicyException
from safegen.policy.settings import Setting, policy_settings, rule_settings
from safegen.policy.tighten import Looser, as_strict, looser, said

Direction = Literal["stricter", "looser", "different"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that two policies have differently.

    Attributes:
        part: `policy`, `rule <id>` or `exception <id>`.
        text: What is different, from the old one to the new one.
        direction: Whether the new one demands more, less, or something that cannot be compared.
        where: `file:line` where the new policy states it; the old one's place for what is gone.
    """

    part: str
    text: str
    direction: Direction
    where: str


def differences(old: Policy, new: Policy, catalogue: Catalogue) -> list[Difference]:
    """Compares two policies.

    Args:
        old: The one before.
        new: The one after.
        catalogue: The concepts that the rules of both name.

    Returns:
        What is different: settings of the whole, rules in the new order and then those that are gone, exceptions. What
        decides nothing (descriptions, owners, the order of keys) is not compared.
    """
    milder, harder = looser(old, new, catalogue), looser(new, old, catalogue)
    return [*_whole(old, new), *_rules(old, new, milder), *_exceptions(old, new, milder, harder)]


def _whole(old: Policy, new: Policy) -> Iterator[Difference]:
    for name in ("id", "version"):
        before, after = getattr(old.metadata, name), getattr(new.metadata, name)
        if before != after:
            text = f"metadata.{name} {before} → {after}"
            yield Difference("policy", text, "different", new.where(("metadata", name)))
    yield from _settings("policy", policy_settings(old), policy_settings(new), new)


def _settings(
    part: str, before: Mapping[str, Setting], after: Mapping[str, Setting], new: Policy
) -> Iterator[Difference]:
    for name, setting in after.items():
        was = before[name].value
        if was != setting.value:
            text = f"{name} {said(was)} → {said(setting.value)}"
            stricter, milder = as_strict(name, was, setting.value), as_strict(name, setting.value, was)
            direction: Direction = "stricter" if stricter else "looser" if milder else "different"
            yield Difference(part, text, direction, new.where(setting.loc))


def _rules(old: Policy, new: Policy, milder: list[Looser]) -> Iterator[Difference]:
    numbers = {rule.id: index for index, rule in enumerate(old.rules)}
    for index, rule in enumerate(new.rules):
        number = numbers.pop(rule.id, None)
        here = new.where(("rules", index))
        if number is None:
            taken_over = any(one.rule == index for one in milder)
            text = f"is new: {rule.action} {rule.concept}"
            yield Difference(f"rule {rule.id}", text, "looser" if taken_over else "stricter", here)
            continue
        was = old.rules[number]
        for name in ("concept", "category"):
            before, after = getattr(was, name), getattr(rule, name)
            if before != after:
                lost = name == "concept" and any(one.left == rule.id for one in milder)
                yield Difference(
                    f"rule {rule.id}", f"{name} {before} → {after}", "looser" if lost else "different", here
                )
        yield from _settings(f"rule {rule.id}", rule_settings(old, number), rule_settings(new, index), new)
    for name, number in numbers.items():
        was = old.rules[number]
        lost = any(one.left == name for one in milder)
        text = f"is gone: {was.action} {was.concept}"
        yield Difference(f"rule {name}", text, "looser" if lost else "different", old.where(("rules", number)))


def _exceptions(old: Policy, new: Policy, milder: list[Looser], harder: list[Looser]) -> Iterator[Difference]:
    before = {exception.id: (index, exception) for index, exception in enumerate(old.exceptions)}
    for index, exception in enumerate(new.exceptions):
        number, was = before.pop(exception.id, (None, None))
        here, part = new.where(("exceptions", index)), f"exception {exception.id}"
        if was is None:
            yield Difference(part, f"is new: {_said(exception)}", "looser", here)
        elif _said(was) != _said(exception):
            looser_now = any(one.exception == index for one in milder)
            stricter_now = any(one.exception == number for one in harder)
            direction: Direction = "different"
            if looser_now != stricter_now:
                direction = "looser" if looser_now else "stricter"
            yield Difference(part, f"{_said(was)} → {_said(exception)}", direction, here)
    for name, (index, was) in before.items():
        yield Difference(f"exception {name}", f"is gone: {_said(was)}", "stricter", old.where(("exceptions", index)))


def _said(exception: PolicyException) -> str:
    when = ", ".join(f"{key} {' or '.join(values)}" for key, values in sorted(exception.when.items()))
    rules = ", ".join(exception.rules)
    return f"{exception.action} for {rules} when {when} until {exception.expires.isoformat()}"
