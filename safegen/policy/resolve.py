"""What a policy comes to on one base model: every rule with its phrases, its membrane and its effective action."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import rfc8785

from safegen.errors import MembraneNotFoundError, PolicyConflictError, did_you_mean
from safegen.policy.catalogue import Catalogue, Concept
from safegen.policy.schema import Action, Audit, Category, Mode, OnMissing, OnUnknown, Policy, Rule, Severity, Transport
from safegen.spans import changes, span
from safegen.text import Match, PhraseMatcher, normalise

_SHOWN = 5  # concept ids that a notice spells out


@dataclass(frozen=True, slots=True)
class ResolvedRule:
    """One rule for one concept.

    Attributes:
        id: The rule's id; `<rule id>/<concept id>` where the rule names a whole category.
        concept: The concept, with all its phrases.
        category: The category that the rule states.
        severity: As in the policy.
        action: What the policy asks for.
        effective: What will be done: as `action`, save that erasing without a membrane becomes refuse or flag.
        strength: Factor on the membrane.
        transport: Scores to permeabilities, defaults filled in.
        on_missing: What the policy says about a missing membrane, default filled in.
        has_membrane: Whether a membrane is available for this concept.
    """

    id: str
    concept: Concept
    category: Category
    severity: Severity
    action: Action
    effective: Action
    strength: float
    transport: Transport
    on_missing: OnMissing
    has_membrane: bool


@dataclass(frozen=True, slots=True)
class ResolvedPolicy:
    """A policy ready to be enforced on one base model.

    Attributes:
        id: Id of the policy.
        version: Version of the policy.
        mode: enforce, observe or disabled.
        on_unknown: What to do with conditioning of unknown origin.
        sentence_encoder: What the score `semantic` reads with: a folder, or a hub id with its commit.
        audit: The record's settings.
        rules: In document order, categories expanded.
        digest: SHA-256, hex, over the RFC 8785 form of all that decides (not of descriptions, owner or key order).
        notices: Sentences that the person who applies the policy should read.
        matcher: Finds the phrases and benign phrases of all rules.
        owners: Indices into `rules` by phrase.
    """

    id: str
    version: str
    mode: Mode
    on_unknown: OnUnknown
    sentence_encoder: str | None
    audit: Audit
    rules: tuple[ResolvedRule, ...]
    digest: str
    notices: tuple[str, ...]
    matcher: PhraseMatcher = field(repr=False, compare=False)
    owners: Mapping[str, tuple[int, ...]] = field(repr=False, compare=False)


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


def resolve(
    policy: Policy, catalogue: Catalogue, *, available: Collection[str], family: str | None = None
) -> ResolvedPolicy:
    """Resolves a policy for one base model.

    A rule that names a concept takes it away from `<category>/*` rules, so exceptions from a group are written as
    rules of their own.

    Args:
        policy: The policy.
        catalogue: The concepts its rules name.
        available: Concept ids that have a membrane for the base model.
        family: Base family, for messages only.

    Returns:
        The resolved policy.

    Raises:
        PolicyConflictError: A rule names a concept that the catalogue lacks, or a category without concepts.
        MembraneNotFoundError: Rules with `on_missing: error` lack a membrane; the message lists all.
    """
    rules = tuple(_expand(policy, catalogue, available))
    base = f" for base family {family}" if family else ""
    absent = [r for r in rules if r.action == "erase" and not r.has_membrane]
    fatal = [r.concept.id for r in absent if r.on_missing == "error"]
    if fatal:
        raise MembraneNotFoundError(
            f"{policy.metadata.id}: {len(fatal)} rules with on_missing: error have no membrane{base}: "
            f"{', '.join(fatal)}; train or install them, or set on_missing to refuse-prompts"
        )
    owners: dict[str, tuple[int, ...]] = {}
    for index, rule in enumerate(rules):
        owners |= {phrase: (*owners.get(phrase, ()), index) for phrase in rule.concept.phrases}
    return ResolvedPolicy(
        id=policy.metadata.id,
        version=policy.metadata.version,
        mode=policy.mode,
        on_unknown=policy.defaults.on_unknown,
        sentence_encoder=policy.defaults.sentence_encoder,
        audit=policy.audit,
        rules=rules,
        digest=hashlib.sha256(rfc8785.dumps(_canonical(policy, rules))).hexdigest(),
        notices=_notices(policy, rules, absent, base),
        matcher=PhraseMatcher([*owners, *(phrase for rule in rules for phrase in rule.concept.benign)]),
        owners=owners,
    )


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
    for index in sorted({index for phrase in found for index in resolved.owners.get(phrase, ())}):
        rule = resolved.rules[index]
        excused = [match for phrase in rule.concept.benign for match in found.get(phrase, ())]
        for phrase in rule.concept.phrases:
            for match in found.get(phrase, ()):
                if not _inside(match, excused):
                    yield Hit(rule.id, rule.concept.id, normalise(phrase)), match


def _inside(match: Match, others: list[Match]) -> bool:
    return any(o.reading == match.reading and o.start <= match.start and match.end <= o.end for o in others)


def _expand(policy: Policy, catalogue: Catalogue, available: Collection[str]) -> Iterator[ResolvedRule]:
    named = {rule.concept for rule in policy.rules}
    for rule in policy.rules:
        selected = catalogue.select(rule.concept)
        if not selected:
            raise PolicyConflictError(
                f"{policy.metadata.id}: rule {rule.id!r} names concept {rule.concept!r}, which the catalogue lacks."
                f"{did_you_mean(rule.concept, catalogue.concepts)}"
            )
        for concept in selected:
            if rule.concept == concept.id:
                yield _resolved(policy, rule, rule.id, concept, concept.id in available)
            elif concept.id not in named:
                yield _resolved(policy, rule, f"{rule.id}/{concept.id}", concept, concept.id in available)


def _resolved(policy: Policy, rule: Rule, rule_id: str, concept: Concept, has_membrane: bool) -> ResolvedRule:
    on_missing = rule.on_missing or policy.defaults.on_missing
    effective = rule.action
    if rule.action == "erase" and not has_membrane:
        effective = "flag" if on_missing == "flag" else "refuse"
    own = rule.transport.model_dump(exclude_unset=True) if rule.transport else {}
    return ResolvedRule(
        id=rule_id,
        concept=concept,
        category=rule.category,
        severity=rule.severity,
        action=rule.action,
        effective=effective,
        strength=rule.strength,
        transport=policy.defaults.transport.model_copy(update=own),
        on_missing=on_missing,
        has_membrane=has_membrane,
    )


def _canonical(policy: Policy, rules: tuple[ResolvedRule, ...]) -> dict[str, Any]:
    """Returns all that decides, as plain values."""
    return {
        "apiVersion": policy.apiVersion,
        "id": policy.metadata.id,
        "version": policy.metadata.version,
        "mode": policy.mode,
        "on_unknown": policy.defaults.on_unknown,
        "sentence_encoder": policy.defaults.sentence_encoder,
        "audit": policy.audit.model_dump(mode="json"),
        "rules": [
            {
                "id": rule.id,
                "concept": rule.concept.id,
                "phrases": list(rule.concept.phrases),
                "benign": list(rule.concept.benign),
                "category": rule.category,
                "severity": rule.severity.value,
                "action": rule.action,
                "effective": rule.effective,
                "strength": rule.strength,
                "transport": rule.transport.model_dump(mode="json"),
                "on_missing": rule.on_missing,
                "has_membrane": rule.has_membrane,
            }
            for rule in rules
        ],
    }


def _notices(policy: Policy, rules: tuple[ResolvedRule, ...], absent: list[ResolvedRule], base: str) -> tuple[str, ...]:
    name = policy.metadata.id
    notices: list[str] = []
    if policy.mode == "disabled":
        notices.append(f"{name}: mode is disabled; nothing is refused, erased or flagged.")
    if policy.mode == "observe":
        notices.append(f"{name}: mode is observe; what would be done is recorded and nothing else happens.")
    erasing = sum(rule.effective == "erase" for rule in rules)
    would = "would be" if policy.mode != "enforce" else "are"
    for effective, verb in (("refuse", "refused"), ("flag", "flagged only")):
        ids = [rule.concept.id for rule in absent if rule.effective == effective]
        if ids:
            shown = ", ".join(ids[:_SHOWN]) + (", …" if len(ids) > _SHOWN else "")
            notices.append(
                f"{name}: {erasing} of {len(rules)} rules erase; {len(ids)} have no membrane{base}: "
                f"prompts that name these concepts {would} {verb} ({shown})"
            )
    return tuple(notices)
