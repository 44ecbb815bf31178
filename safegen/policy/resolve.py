"""What a policy comes to on one base model, for one caller, at one time: the only place that decides it.

The runtime, `safegen test`, `audit` and `explain` all ask `resolve`, or `ResolvedPolicy.at`, which it ends with.
Nothing else looks at when an exception expires or whom it is for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime

from safegen.errors import MembraneNotFoundError, UsageError
from safegen.policy.canonical import digest_of
from safegen.policy.catalogue import Catalogue, Concept
from safegen.policy.context import TASK, Context, checked
from safegen.policy.fields import Action, Category, Mode, OnMissing, OnUnknown, Severity, Task
from safegen.policy.notices import notices_of
from safegen.policy.schema import Audit, Policy, PolicyException, Transport
from safegen.policy.settings import Taken, rule_settings, taken
from safegen.text import PhraseMatcher


@dataclass(frozen=True, slots=True)
class ResolvedRule:
    """One rule for one concept.

    Attributes:
        id: The rule's id; `<rule id>/<concept id>` where the rule names a whole category.
        concept: The concept, with all its phrases.
        category: The category that the rule states.
        severity: As in the policy.
        action: What the policy asks for.
        effective: What will be done: as `action`, save that an exception may ask for less, and that erasing without a
            membrane becomes refuse or flag.
        strength: Factor on the membrane.
        transport: Scores to permeabilities, defaults filled in.
        on_missing: What the policy says about a missing membrane, default filled in.
        applies_to: The tasks that it holds for.
        has_membrane: Whether a membrane is available for this concept.
        places: `file:line` of what decides in it, by field (`action`, `transport.lo`), or `built-in default`.
        exception: Id of the exception that holds for this caller now; None where none does.
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
    applies_to: tuple[Task, ...]
    has_membrane: bool
    places: Mapping[str, str] = field(repr=False, compare=False)
    exception: str | None = None

    @property
    def uses_membrane(self) -> bool:
        """Whether a membrane erases for it: also where it refuses, for what only a score sees."""
        return self.has_membrane and self.action != "flag"


@dataclass(frozen=True, slots=True)
class ResolvedException:
    """An exception, and the ids of the resolved rules that it is from.

    Attributes:
        stated: What the policy says.
        rules: Ids of resolved rules.
        place: `file:line` where it stands.
    """

    stated: PolicyException
    rules: frozenset[str]
    place: str

    def expired(self, today: date) -> bool:
        """Tells whether its last day is over."""
        return today > self.stated.expires

    def holds(self, context: Context, today: date) -> bool:
        """Tells whether it holds for a caller on a day."""
        return not self.expired(today) and all(
            key in context and context[key] in values for key, values in self.stated.when.items()
        )


@dataclass(frozen=True, slots=True)
class ResolvedPolicy:
    """A policy ready to be enforced on one base model, for one caller, at one time.

    Attributes:
        id: Id of the policy.
        version: Version of the policy.
        mode: enforce, observe or disabled.
        on_unknown: What to do with conditioning of unknown origin.
        sentence_encoder: What the score `semantic` reads with: a folder, or a hub id with its commit.
        audit: The record's settings.
        rules: In document order, categories expanded; those that do not apply to the caller's task are not among them.
        exceptions: All exceptions, whether they hold or not.
        digest: SHA-256, hex, over the RFC 8785 form of all that decides (not of descriptions, owners or key order), the
            same for every caller and at every time.
        notices: Sentences that the person who applies the policy should read.
        every_rule: All rules, as they are for a caller without exceptions and whose task is not known.
        matcher: Finds the phrases and benign phrases of all rules.
        owners: Indices into `every_rule` by phrase.
    """

    id: str
    version: str
    mode: Mode
    on_unknown: OnUnknown
    sentence_encoder: str | None
    audit: Audit
    rules: tuple[ResolvedRule, ...]
    exceptions: tuple[ResolvedException, ...]
    digest: str
    notices: tuple[str, ...]
    every_rule: tuple[ResolvedRule, ...] = field(repr=False)
    matcher: PhraseMatcher = field(repr=False, compare=False)
    owners: Mapping[str, tuple[int, ...]] = field(repr=False, compare=False)

    def at(self, now: datetime, context: Context) -> ResolvedPolicy:
        """Returns what the policy comes to for a caller at a time.

        Args:
            now: The time, with its zone.
            context: What the caller says about the request (`safegen.policy.context`).

        Raises:
            UsageError: The time has no zone, or the context holds something else than texts, or an unknown task.
        """
        if now.tzinfo is None:
            raise UsageError("expected a time with its zone, such as datetime.now(UTC); a time without one is no time")
        context, today = checked(context), now.astimezone(UTC).date()
        holding = [exception for exception in self.exceptions if exception.holds(context, today)]
        task = context.get(TASK)
        rules = self.every_rule
        if holding or task is not None:
            rules = tuple(_excepted(rule, holding) for rule in rules if task is None or task in rule.applies_to)
        return replace(self, rules=rules)


def _excepted(rule: ResolvedRule, holding: Collection[ResolvedException]) -> ResolvedRule:
    """Returns a rule under the exceptions that hold: the mildest counts, among equals the first."""
    found = [exception for exception in holding if rule.id in exception.rules]
    if not found:
        return rule
    mildest = min(found, key=lambda exception: ("flag", "erase").index(exception.stated.action))
    effective = _effective(mildest.stated.action, rule.on_missing, rule.has_membrane)
    return replace(rule, effective=effective, exception=mildest.stated.id)


def _effective(action: Action, on_missing: OnMissing, has_membrane: bool) -> Action:
    if action == "erase" and not has_membrane:
        return "flag" if on_missing == "flag" else "refuse"
    return action


def resolve(
    policy: Policy,
    catalogue: Catalogue,
    *,
    available: Collection[str],
    now: datetime,
    context: Context | None = None,
    family: str | None = None,
) -> ResolvedPolicy:
    """Resolves a policy for one base model, one caller and one time.

    A rule that names a concept takes it away from `<category>/*` rules, so what is different about one concept of a
    category is written as a rule of its own.

    Args:
        policy: The policy.
        catalogue: The concepts its rules name.
        available: Concept ids that have a membrane for the base model.
        now: The time that exceptions are held against, with its zone.
        context: What the caller says about the request: a tenant, a route, a task; by default nothing.
        family: Base family, for messages only.

    Returns:
        The resolved policy.

    Raises:
        PolicyConflictError: A rule names a concept that the catalogue lacks, or a category without concepts.
        MembraneNotFoundError: Rules with `on_missing: error` lack a membrane; the message lists all.
        UsageError: The time has no zone, or the context cannot be used.
    """
    concepts = taken(policy, catalogue)
    rules = tuple(_rules(policy, concepts, available))
    base = f" for base family {family}" if family else ""
    fatal = [r.concept.id for r in rules if r.action == "erase" and not r.has_membrane and r.on_missing == "error"]
    if fatal:
        raise MembraneNotFoundError(
            f"{policy.metadata.id}: {len(fatal)} rules with on_missing: error have no membrane{base}: "
            f"{', '.join(fatal)}; train or install them, or set on_missing to refuse-prompts"
        )
    owners: dict[str, tuple[int, ...]] = {}
    for index, rule in enumerate(rules):
        for phrase in rule.concept.phrases:
            owners[phrase] = (*owners.get(phrase, ()), index)
    exceptions = tuple(_exceptions(policy, concepts))
    everything = ResolvedPolicy(
        id=policy.metadata.id,
        version=policy.metadata.version,
        mode=policy.mode,
        on_unknown=policy.defaults.on_unknown,
        sentence_encoder=policy.defaults.sentence_encoder,
        audit=policy.audit,
        rules=rules,
        exceptions=exceptions,
        digest=digest_of(policy, rules, exceptions),
        notices=notices_of(policy, rules, exceptions, base, now),
        every_rule=rules,
        matcher=PhraseMatcher([*owners, *(phrase for rule in rules for phrase in rule.concept.benign)]),
        owners=owners,
    )
    return everything.at(now, context or {})


def _rules(policy: Policy, concepts: list[Taken], available: Collection[str]) -> Iterator[ResolvedRule]:
    settings = [rule_settings(policy, index) for index in range(len(policy.rules))]
    places = [{name: policy.where(setting.loc) for name, setting in found.items()} for found in settings]
    transports = [
        Transport.model_validate({name: found[f"transport.{name}"].value for name in Transport.model_fields})
        for found in settings
    ]
    for one in concepts:
        rule, found, has_membrane = policy.rules[one.index], settings[one.index], one.concept.id in available
        yield ResolvedRule(
            id=one.id,
            concept=one.concept,
            category=rule.category,
            severity=rule.severity,
            action=rule.action,
            effective=_effective(rule.action, found["on_missing"].value, has_membrane),
            strength=rule.strength,
            transport=transports[one.index],
            on_missing=found["on_missing"].value,
            applies_to=rule.applies_to,
            has_membrane=has_membrane,
            places=places[one.index],
        )


def _exceptions(policy: Policy, concepts: list[Taken]) -> Iterator[ResolvedException]:
    for index, stated in enumerate(policy.exceptions):
        named = set(stated.rules)
        rules = frozenset(one.id for one in concepts if one.id in named or policy.rules[one.index].id in named)
        yield ResolvedException(stated, rules, policy.where(("exceptions", index)))
