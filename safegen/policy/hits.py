"""Which rules of a resolved policy a prompt names, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from safegen.policy.resolve import ResolvedPolicy
from safegen.spans import changes, span
from safegen.text import Match, normalise


@dataclass(frozen=True, slots=True)
class Hit:
    """A prompt names a concept.

    Attributes:
        rule: Id of the resolved rule.
        concept: Id of the concept.
        phrase: The phrase that was found, normalised.
    """

    rule: str
    concept: str
    phrase: str


@dataclass(frozen=True, slots=True)
class LocatedHit:
    """A place where a prompt names a concept.

    Attributes:
        hit: Which rule, concept and phrase.
        start: Offset of its first character in the prompt, in code points.
        end: Offset after its last character.
        changes: What had to be normalised to find it (`safegen.spans.CHANGES`).
    """

    hit: Hit
    start: int
    end: int
    changes: tuple[str, ...]


def lexical_hits(resolved: ResolvedPolicy, prompt: str) -> tuple[Hit, ...]:
    """Returns the rules whose concept a prompt names, whatever their action.

    Args:
        resolved: The policy.
        prompt: Any text.

    Returns:
        One hit per rule and phrase, in rule order; phrases inside a benign phrase of the same concept do not count.
    """
    return tuple(dict.fromkeys(hit for hit, _ in _counted(resolved, prompt)))


def located_hits(resolved: ResolvedPolicy, prompt: str) -> tuple[LocatedHit, ...]:
    """Returns every place where a prompt names a concept of a rule, in rule order, then in reading order.

    Args:
        resolved: The policy.
        prompt: Any text.

    Returns:
        The hits with their places; a phrase that is found in both readings at one place comes once.
    """
    found: dict[tuple[Hit, tuple[int, int]], LocatedHit] = {}
    for hit, match in _counted(resolved, prompt):
        start, end = span(prompt, match)
        found.setdefault((hit, (start, end)), LocatedHit(hit, start, end, changes(prompt, match)))
    return tuple(found.values())


def _counted(resolved: ResolvedPolicy, prompt: str) -> Iterator[tuple[Hit, Match]]:
    """Yields what counts as naming a concept: matches that are not inside a benign phrase."""
    found: dict[str, list[Match]] = {}
    for match in resolved.matcher.find(prompt):
        found.setdefault(match.phrase, []).append(match)
    current = {rule.id for rule in resolved.rules} if found else set[str]()
    for index in sorted({index for phrase in found for index in resolved.owners.get(phrase, ())}):
        rule = resolved.every_rule[index]
        if rule.id not in current:
            continue  # it does not apply to the caller's task
        excused = [match for phrase in rule.concept.benign for match in found.get(phrase, ())]
        for phrase in rule.concept.phrases:
            for match in found.get(phrase, ()):
                if not _inside(match, excused):
                    yield Hit(rule.id, rule.concept.id, normalise(phrase)), match


def _inside(match: Match, others: list[Match]) -> bool:
    return any(o.reading == match.reading and o.start <= match.start and match.end <= o.end for o in others)
