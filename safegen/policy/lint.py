"""What a valid policy may still get wrong: each lint has an id, a level, and a section in docs/reference/lint.md.

A fault of the document is not a lint: `load_policy` refuses it. A lint looks at one policy file, with the cases beside
it and, where a base family is named, at the membranes that its rules would use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal, cast

from safegen.errors import PolicyValidationError
from safegen.policy.cases import EVERY_RULE, SUFFIX, Cases, read_cases
from safegen.policy.catalogue import Catalogue
from safegen.policy.consistency import entries
from safegen.policy.document import Document, Loc, Place, read_document
from safegen.policy.fields import Severity
from safegen.policy.load import check_policy
from safegen.policy.schema import Policy
from safegen.policy.settings import rule_settings, taken
from safegen.policy.testing import cases_beside, coverage
from safegen.policy.yaml11 import misread

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("note", "warning", "error")
"""From the mildest."""

FAR = timedelta(days=180)
_IMAGE_TASKS = ("img2img", "inpaint")
_EMPTY_WORDS = frozenset(("todo", "tbd", "fixme", "n/a", "na", "none", "nil", "test", "temp", "temporary", "reason"))
_SHORTEST_REASON = 8


@dataclass(frozen=True, slots=True)
class MembraneFacts:
    """What is known of an installed membrane: its file, that file's digest, its base, and what its card pins."""

    path: Path
    sha256: str
    base: str
    card: str


@dataclass(frozen=True, slots=True)
class Subject:
    """One policy file, and what its lints may look at.

    Attributes:
        path: The file.
        document: Its own content; what it inherits is looked at in the file that states it.
        policy: The policy, with all that it extends.
        cases: The cases beside it.
        catalogue: The concepts.
        today: The day that exceptions are held against.
        base: The base family of `membranes`; None where membranes are not looked at.
        membranes: Installed membranes by concept id.
    """

    path: Path
    document: Document
    policy: Policy
    cases: Cases | None
    catalogue: Catalogue
    today: date
    base: str | None = None
    membranes: Mapping[str, MembraneFacts] = field(default_factory=dict[str, MembraneFacts])

    def own(self, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the entries that the file itself states under `rules` or `exceptions`, with their indices."""
        yield from entries(cast("dict[str, Any]", self.document.value), key)

    def index_of(self, rule: str) -> int:
        """Returns where a rule stands in the whole policy."""
        return next(k for k, one in enumerate(self.policy.rules) if one.id == rule)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a lint found: by which lint, how bad, where, and what to do."""

    lint: str
    level: Level
    place: Place
    message: str


Found = Iterator[tuple[Place, str]]


@dataclass(frozen=True, slots=True)
class Lint:
    """One lint.

    Attributes:
        id: `SG` and three digits; never given to another lint.
        name: In words, kebab case.
        level: `error` where a policy lets through what it says it keeps out.
        summary: What it finds, as a sentence.
        check: Yields places and messages.
    """

    id: str
    name: str
    level: Level
    summary: str
    check: Callable[[Subject], Found]


def lint(subject: Subject) -> tuple[Finding, ...]:
    """Returns what all lints find in a policy file, in the order of files, lines and lints."""
    found = [Finding(one.id, one.level, place, text) for one in LINTS for place, text in one.check(subject)]
    return tuple(sorted(found, key=lambda f: (f.place.source != str(subject.path), f.place.line, f.place.column)))


def subject_of(path: Path, catalogue: Catalogue, today: date) -> Subject:
    """Reads a policy file and the cases beside it.

    Raises:
        PolicySyntaxError: Not YAML, or YAML that safegen refuses.
        PolicyValidationError: Faults in the policy or in its cases.
    """
    policy, problems = check_policy(path, catalogue=catalogue)
    if policy is None or problems:
        raise PolicyValidationError(problems)
    beside = cases_beside(path)
    cases = read_cases(beside) if beside is not None else None
    return Subject(path, read_document(path), policy, cases, catalogue, today)


def _untested(subject: Subject) -> Found:
    cases = subject.cases.content.cases if subject.cases is not None else ()
    covered = {one.rule: one for one in coverage(subject.policy, cases)}
    for index, rule in subject.own("rules"):
        one = covered[rule["id"]]
        lacks = [text for text, count in (("opens it", one.opening), ("leaves it shut", one.closing)) if not count]
        if lacks:
            file = subject.path.stem + SUFFIX
            text = f"rule {one.rule!r} has no test case that {' and none that '.join(lacks)}; add one to {file}"
            yield subject.document.position(("rules", index, "id")), text


def _far_exception(subject: Subject) -> Found:
    days = {one.id: one.expires for one in subject.policy.exceptions}
    for index, exception in subject.own("exceptions"):
        ahead = days[exception["id"]] - subject.today
        if ahead > FAR:
            text = (
                f"exception {exception['id']!r} holds for {ahead.days} more days; expected at most {FAR.days}: "
                "let it expire sooner, and renew it if it is still needed then"
            )
            yield subject.document.position(("exceptions", index, "expires")), text


def _lets_through(subject: Subject) -> Found:
    if subject.policy.mode != "enforce":
        return
    erasing = {rule.id for rule in subject.policy.rules if rule.action == "erase"}
    silent = {rule.id for rule in subject.policy.rules if rule.id in erasing and rule.on_missing is None}
    places: list[Loc] = [
        ("rules", index, "on_missing")
        for index, rule in subject.own("rules")
        if rule.get("on_missing") == "flag" and rule["id"] in erasing
    ]
    if ("defaults", "on_missing") in subject.document.values and silent:
        stated = cast("dict[str, Any]", subject.document.value)["defaults"]["on_missing"]
        places += [("defaults", "on_missing")] if stated == "flag" else []
    for loc in places:
        text = (
            "on_missing: flag draws what the policy means to erase wherever a membrane is missing; use refuse-prompts "
            "or error, or state `action: flag` if recording is all that is wanted"
        )
        yield subject.document.position(loc), text


def _unpinned(subject: Subject) -> Found:
    for index, concept, facts in _membranes(subject):
        if facts.sha256 not in facts.card:
            text = (
                f"the membrane of {concept!r} ({facts.path}) is not pinned: no card.md beside it states its sha256 "
                f"{facts.sha256}; write it there once the file was checked"
            )
            yield subject.document.position(("rules", index, "concept")), text


def _of_another_base(subject: Subject) -> Found:
    for index, concept, facts in _membranes(subject):
        if facts.base and facts.base != subject.base:
            text = (
                f"the membrane of {concept!r} ({facts.path}) was made for base {facts.base!r}, not {subject.base!r}; "
                "install the one for this base"
            )
            yield subject.document.position(("rules", index, "concept")), text


def _membranes(subject: Subject) -> Iterator[tuple[int, str, MembraneFacts]]:
    """Yields the rules of the file with the membranes they would use: index, concept id, facts."""
    own = {rule["id"]: index for index, rule in subject.own("rules")}
    for one in taken(subject.policy, subject.catalogue):
        index = own.get(subject.policy.rules[one.index].id)
        if index is not None and one.concept.id in subject.membranes:
            yield index, one.concept.id, subject.membranes[one.concept.id]


def _misread_scalar(subject: Subject) -> Found:
    for place, text, meant in misread(subject.path):
        yield place, f"{text} without quotes is {meant} to YAML 1.1 tools; put it in quotes"


def _redundant(subject: Subject) -> Found:
    rules = subject.policy.rules
    whole = taken(subject.policy, subject.catalogue)
    for own, rule in subject.own("rules"):
        index = subject.index_of(rule["id"])
        mine = {one.concept.id for one in whole if one.index == index}
        others = [k for k in range(len(rules)) if k != index]
        if not others:
            continue
        rest = subject.policy.model_copy(update={"rules": tuple(rules[k] for k in others)})
        wider = {one.concept.id: others[one.index] for one in taken(rest, subject.catalogue)}
        heirs = {wider.get(concept) for concept in mine}
        if mine and len(heirs) == 1 and (heir := heirs.pop()) is not None and _alike(subject.policy, index, heir):
            text = (
                f"rule {rule['id']!r} does what the wider rule {rules[heir].id!r} does for {rules[index].concept} "
                "anyway; remove it, or state what is different"
            )
            yield subject.document.position(("rules", own, "concept")), text


def _alike(policy: Policy, one: int, other: int) -> bool:
    values = [{name: setting.value for name, setting in rule_settings(policy, index).items()} for index in (one, other)]
    return values[0] == values[1]


def _text_only(subject: Subject) -> Found:
    for index, rule in subject.own("rules"):
        tasks = subject.policy.rules[subject.index_of(rule["id"])].applies_to
        lacks = [task for task in _IMAGE_TASKS if task not in tasks]
        if lacks:
            text = (
                f"rule {rule['id']!r} does not apply to {' and '.join(lacks)}: the same prompt with a picture passes; "
                "add them, or leave applies_to out"
            )
            yield subject.document.position(("rules", index, "applies_to")), text


def _empty_reason(subject: Subject) -> Found:
    content = cast("dict[str, Any]", subject.document.value)
    stated: list[tuple[Loc, dict[str, Any]]] = [((), content)] if content.get("override") else []
    stated += [(("rules", index), rule) for index, rule in subject.own("rules") if rule.get("override")]
    stated += [(("exceptions", index), exception) for index, exception in subject.own("exceptions")]
    for loc, holder in stated:
        reason = str(holder.get("reason", "")).strip()
        if reason.casefold().strip(".! ") in _EMPTY_WORDS or sum(c.isalnum() for c in reason) < _SHORTEST_REASON:
            text = f"the reason {reason!r} says nothing to a reviewer; state a ticket, or why this is looser"
            yield subject.document.position((*loc, "reason")), text


def _words_only(subject: Subject) -> Found:
    for own, rule in subject.own("rules"):
        index = subject.index_of(rule["id"])
        whole, found = subject.policy.rules[index], rule_settings(subject.policy, index)
        blind = found["transport.score"].value == ("lexical",) and found["transport.least"].value == 0
        if whole.action == "erase" and whole.severity >= Severity.HIGH and blind:
            text = (
                f"rule {whole.id!r} of severity {whole.severity.value} opens by words alone, and not at all without "
                "them: a paraphrase passes; add the score direction, or a floor (`least` above 0)"
            )
            yield subject.document.position(("rules", own, "transport")), text


def _no_benign_case(subject: Subject) -> Found:
    cases = subject.cases
    if cases is None or not cases.content.cases:
        return
    if not any(EVERY_RULE in case.expect for case in cases.content.cases):
        text = (
            'no case expects every rule to stay shut: add an ordinary caption with `expect: {"*": shut}`, so that a '
            "rule that opens on everything fails"
        )
        yield cases.document.position(("cases",), key=True), text


LINTS: Sequence[Lint] = (
    Lint("SG001", "rule-without-test", "warning", "A rule that no case opens, or that no case holds shut.", _untested),
    Lint("SG002", "far-exception", "warning", "An exception that expires more than 180 days ahead.", _far_exception),
    Lint("SG003", "lets-through", "error", "Mode enforce, but a missing membrane lets prompts pass.", _lets_through),
    Lint("SG004", "membrane-not-pinned", "warning", "A membrane whose card does not state its sha256.", _unpinned),
    Lint("SG005", "yaml-1.1-scalar", "warning", "A value that YAML 1.1 tools read as another one.", _misread_scalar),
    Lint("SG006", "redundant-rule", "note", "A rule that a wider rule makes redundant.", _redundant),
    Lint("SG007", "image-tasks-left-out", "warning", "A rule that does not apply to img2img or inpaint.", _text_only),
    Lint("SG008", "empty-reason", "warning", "An override or exception whose reason says nothing.", _empty_reason),
    Lint("SG009", "foreign-membrane", "error", "A membrane that was made for another base model.", _of_another_base),
    Lint("SG010", "words-only", "warning", "A grave rule that opens by words alone, without a floor.", _words_only),
    Lint("SG011", "no-benign-case", "warning", "Cases none of which expects every rule to stay shut.", _no_benign_case),
)
