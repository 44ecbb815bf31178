"""Policy tests, run: every case judged, and which rules have both a case that opens them and one that leaves them shut.

Without a model the judge is the text side alone (`WordsJudge`): what the phrases of the catalogue find, with every
membrane taken as installed. The whole gate judges where a model is given (`safegen.cli.gate_judge`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any, Protocol, cast

from safegen.errors import PolicyNotFoundError, PolicyValidationError, Problem
from safegen.policy.cases import EVERY_RULE, SUFFIX, Case, Cases, Expected, read_cases, unknown_rules
from safegen.policy.catalogue import load_catalogue
from safegen.policy.context import TASK, utc_now
from safegen.policy.document import Place, read_document
from safegen.policy.fields import Action
from safegen.policy.hits import lexical_hits
from safegen.policy.load import find_policy, load_policy
from safegen.policy.resolve import ResolvedRule, resolve
from safegen.policy.schema import Policy

_MAY_BE_POLICY = re.compile(rb"kind[\"']?\s*:\s*[\"']?Policy\b")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a prompt does to one resolved rule.

    Attributes:
        rule: Id of the resolved rule.
        touched: Whether the prompt opens its membrane, or names the concept of a rule that acts by words.
        action: What the policy asks for, for this caller on this day; a membrane that is missing changes nothing here.
        permeability: How far the membrane opens.
        words: The phrases found.
    """

    rule: str
    touched: bool
    action: Action
    permeability: float
    words: tuple[str, ...] = ()


class Judge(Protocol):
    """Says what prompts do to the rules of one policy."""

    def rules(self) -> tuple[str, ...]:
        """Returns the ids of all rules, categories expanded."""
        ...

    def judge(self, case: Case, now: datetime) -> Sequence[Seen]:
        """Returns what a case does to the rules that apply to it."""
        ...


class WordsJudge:
    """Judges by words alone, as if every membrane were installed."""

    def __init__(self, policy: Policy) -> None:
        """Resolves a policy.

        Raises:
            PolicyConflictError: The policy names a concept that the catalogue lacks.
        """
        catalogue = load_catalogue()
        self._policy = resolve(policy, catalogue, available=catalogue.concepts.keys(), now=utc_now())

    def rules(self) -> tuple[str, ...]:
        """Returns the ids of all rules, categories expanded."""
        return tuple(rule.id for rule in self._policy.every_rule)

    def judge(self, case: Case, now: datetime) -> Sequence[Seen]:
        """Returns what the words of a case do to the rules that apply to it."""
        view = self._policy.at(now, context_of(case))
        words: dict[str, tuple[str, ...]] = {}
        for hit in lexical_hits(view, case.prompt):
            words[hit.rule] = (*words.get(hit.rule, ()), hit.phrase)
        return [_seen(rule, words.get(rule.id, ())) for rule in view.rules]


def _seen(rule: ResolvedRule, words: tuple[str, ...]) -> Seen:
    opened = "always" in rule.transport.score or ("lexical" in rule.transport.score and bool(words))
    permeability = 1.0 if opened else rule.transport.least
    if rule.effective == "flag":
        permeability = 0.0
    named = bool(words) and rule.effective != "erase"
    return Seen(rule.id, named or permeability > 0, rule.effective, permeability, words)


def context_of(case: Case) -> Mapping[str, str]:
    """Returns the caller's context of a case, its task included."""
    return {**case.context, **({TASK: case.task} if case.task else {})}


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case: its name, where it stands, and what was not as expected (nothing, if it passed)."""

    name: str
    place: Place
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RuleCoverage:
    """How many cases of a file open a rule, and how many hold it shut."""

    rule: str
    opening: int
    closing: int

    @property
    def covered(self) -> bool:
        """Whether it has at least one of each."""
        return self.opening > 0 and self.closing > 0


@dataclass(frozen=True, slots=True)
class Suite:
    """The result of one file of cases.

    Attributes:
        path: The file; of a policy without one, the file that it should have.
        policy: The policy.
        cases: In file order.
        covering: The cases of this file and of all others that test the same policy.
    """

    path: Path
    policy: Policy
    cases: tuple[CaseResult, ...]
    covering: Sequence[Case]

    @property
    def coverage(self) -> tuple[RuleCoverage, ...]:
        """What the cases of all files that test the policy cover, in rule order."""
        return coverage(self.policy, self.covering)

    @property
    def failed(self) -> tuple[CaseResult, ...]:
        """The cases that were not as expected."""
        return tuple(case for case in self.cases if case.failures)


def find_cases(paths: Sequence[str | Path]) -> list[tuple[Path, Path | None]]:
    """Finds the files to test.

    Args:
        paths: Files of cases, policy files or names of shipped policies (whose cases stand beside them), and folders,
            searched with all below.

    Returns:
        Policy files and the files of cases that test them; None for a policy without one. A policy that several files
        test comes once for each.

    Raises:
        PolicyNotFoundError: A path is none of these, or a folder holds neither policies nor cases.
    """
    found: dict[tuple[Path, Path | None], None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = list(_in_folder(path))
            if not inside:
                raise PolicyNotFoundError(f"{path}: neither a policy nor a file of cases (*{SUFFIX}) in this folder")
            found |= dict.fromkeys(inside)
        elif path.name.endswith(SUFFIX):
            found[_policy_of(path), path] = None
        else:
            policy = find_policy(given)
            found[policy, cases_beside(policy)] = None
    return list(found)


def cases_beside(policy: Path) -> Path | None:
    """Returns the file of cases that stands beside a policy and tests it; None where there is none."""
    beside = policy.with_name(policy.stem + SUFFIX)
    return beside if beside.is_file() and _policy_of(beside).resolve() == policy.resolve() else None


def policies_in(folder: Path) -> list[Path]:
    """Returns the policy files in a folder and below it, sorted."""
    files = [path for path in sorted(folder.rglob("*.yaml")) if not path.name.endswith(SUFFIX)]
    return [path for path in files if _is_policy(path)]


def _in_folder(folder: Path) -> Iterator[tuple[Path, Path | None]]:
    tested: set[Path] = set()
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        policy = _policy_of(path)
        tested.add(policy.resolve())
        yield policy, path
    for path in policies_in(folder):
        if path.resolve() not in tested:
            yield path, None


def _policy_of(cases: Path) -> Path:
    named = read_cases(cases).content.policy
    beside = cases.parent / named
    return beside if beside.is_file() else find_policy(named)


def _is_policy(path: Path) -> bool:
    # Files of concepts are large: what is no policy by its text is not parsed.
    if not _MAY_BE_POLICY.search(path.read_bytes()):
        return False
    content = read_document(path).value
    return isinstance(content, dict) and cast("dict[str, Any]", content).get("kind") == "Policy"


def run_cases(
    paths: Sequence[str | Path], judge_of: Callable[[Path, Policy], Judge], *, today: date | None = None
) -> tuple[Suite, ...]:
    """Runs policy tests.

    Args:
        paths: What to test; see `find_cases`.
        judge_of: Makes the judge of a policy, from its file and its content.
        today: The day for cases that state none; by default the clock's, in UTC.

    Returns:
        One result per file of cases, and per policy without one.

    Raises:
        PolicyError: A policy or a file of cases cannot be read, or has faults; those of all files are listed.
    """
    day = today or utc_now().astimezone(UTC).date()
    suites: list[Suite] = []
    covering: dict[Path, list[Case]] = {}  # the cases of all files that test a policy
    problems: list[Problem] = []
    for policy_path, cases_path in find_cases(paths):
        try:
            policy = load_policy(policy_path)
            judge = judge_of(policy_path, policy)
            cases = read_cases(cases_path) if cases_path is not None else None
            problems += unknown_rules(cases, policy, judge.rules()) if cases is not None else []
        except PolicyValidationError as error:
            problems += error.problems
            continue
        if not problems:
            path = cases_path or policy_path.with_name(policy_path.stem + SUFFIX)
            results = tuple(_results(cases, judge, day)) if cases is not None else ()
            together = covering.setdefault(policy_path.resolve(), [])
            together += cases.content.cases if cases is not None else ()
            suites.append(Suite(path, policy, results, together))
    if problems:
        raise PolicyValidationError(dict.fromkeys(problems))
    return tuple(suites)


def _results(cases: Cases, judge: Judge, day: date) -> Iterator[CaseResult]:
    for index, case in enumerate(cases.content.cases):
        now = datetime.combine(case.now or cases.content.now or day, time(12), UTC)
        seen = judge.judge(case, now)
        failures = [text for rule, expected in case.expect.items() for text in _failures(case, rule, expected, seen)]
        yield CaseResult(case.name, cases.place(index), tuple(failures))


def coverage(policy: Policy, cases: Iterable[Case]) -> tuple[RuleCoverage, ...]:
    """Returns how many cases open each rule of a policy, and how many hold it shut."""
    found: list[RuleCoverage] = []
    cases = tuple(cases)
    for rule in policy.rules:
        expected = [
            expectation
            for case in cases
            for name, expectation in case.expect.items()
            if name.split("/")[0] == rule.id or (name == EVERY_RULE and not _names(case, rule.id))
        ]
        found.append(RuleCoverage(rule.id, sum(e.opens for e in expected), sum(e.shuts for e in expected)))
    return tuple(found)


def _names(case: Case, rule: str) -> bool:
    return any(name.split("/")[0] == rule for name in case.expect)


def _failures(case: Case, name: str, expected: Expected, seen: Sequence[Seen]) -> Iterator[str]:
    """Yields what is not as one expectation says."""
    if name == EVERY_RULE:
        group = [one for one in seen if not _names(case, one.rule.split("/")[0])]
    else:
        group = [one for one in seen if one.rule == name or one.rule.split("/")[0] == name]
    touched = [one for one in group if one.touched]
    if expected.action == "shut" and touched:
        yield f"{name}: expected shut, found {_shown(touched)}"
    elif expected.action not in (None, "shut") and not touched:
        yield f"{name}: expected {expected.action}, but the rule is not touched"
    elif expected.action not in (None, "shut"):
        other = [one for one in touched if one.action != expected.action]
        if other:
            yield f"{name}: expected {expected.action}, found {_shown(other)}"
    furthest = max((one.permeability for one in group), default=0.0)
    if expected.permeability is not None and not expected.permeability.holds(furthest):
        yield f"{name}: expected permeability {expected.permeability}, found {furthest:.3f}"


def _shown(found: Iterable[Seen]) -> str:
    parts = [f"{one.action} by {one.rule}" + (f" ({', '.join(one.words)})" if one.words else "") for one in found]
    return "; ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")
