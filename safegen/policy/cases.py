"""Policy tests as documents: what a policy must find in a prompt, and what it must leave alone.

`strict.policytest.yaml` stands beside `strict.yaml`. An expectation names a rule, or `"*"` for every rule that the case
does not name, and says what follows: `erase`, `refuse` or `flag` where the rule must be touched, `shut` where it must
not, or a mapping with a bound on the permeability.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from safegen.errors import PolicyValidationError, Problem, did_you_mean
from safegen.policy.document import Document, Place, read_document
from safegen.policy.faults import in_document_order, validate
from safegen.policy.fields import ContextKey, Day, Strict, Task, Words
from safegen.policy.schema import Policy

SUFFIX = ".policytest.yaml"
EVERY_RULE = "*"

_BOUND = re.compile(r"(>=|<=|>|<)?\s*([0-9]*\.?[0-9]+)")
_EQUAL = 1e-6


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound on a permeability: an operator (`==` where none is written) and a number."""

    operator: Literal[">=", "<=", ">", "<", "=="]
    value: float

    def holds(self, found: float) -> bool:
        """Tells whether a permeability keeps to it."""
        return {
            ">=": found >= self.value,
            "<=": found <= self.value,
            ">": found > self.value,
            "<": found < self.value,
            "==": abs(found - self.value) <= _EQUAL,
        }[self.operator]

    def __str__(self) -> str:
        return f"{self.operator} {self.value:g}"


def _parse_bound(value: object) -> object:
    if isinstance(value, Bound):
        return value
    found = _BOUND.fullmatch(str(value).strip()) if isinstance(value, str | int | float) else None
    if isinstance(value, bool) or found is None or float(found[2]) > 1:
        raise PydanticCustomError("bound", "expected a number from 0 to 1, with >=, <=, > or < before it (in quotes)")
    return Bound(found[1] or "==", float(found[2]))  # type: ignore[arg-type]


def _spelled_out(value: object) -> object:
    return {"action": value} if isinstance(value, str) else value


class Expected(Strict):
    """What must follow for one rule.

    Attributes:
        action: What must be done about the prompt; `shut` where the rule must not be touched.
        permeability: Bound on how far the rule's membranes open; of a category, the one that opens furthest.
    """

    action: Literal["erase", "refuse", "flag", "shut"] | None = None
    permeability: Annotated[Bound | None, BeforeValidator(_parse_bound)] = None

    @model_validator(mode="after")
    def _check_something_is_expected(self) -> Self:
        if self.action is None and self.permeability is None:
            raise PydanticCustomError("empty", "expected an action or a bound on the permeability")
        return self

    @property
    def opens(self) -> bool:
        """Whether a rule that is never touched would fail this."""
        if self.action is not None:
            return self.action != "shut"
        return self.permeability is not None and not self.permeability.holds(0.0)

    @property
    def shuts(self) -> bool:
        """Whether a rule that is always fully open would fail this."""
        if self.action is not None:
            return self.action == "shut"
        return self.permeability is not None and not self.permeability.holds(1.0)


class Case(Strict):
    """One prompt, and what must follow.

    Attributes:
        name: Unique in its file.
        prompt: The prompt.
        negative: The negative prompt; what stands there is already pushed away and must open nothing by itself.
        context: What the caller says about the request, such as a tenant; exceptions are matched against it.
        task: The kind of generation; by default unknown, which every rule applies to.
        now: The day on which the prompt comes in, in UTC; exceptions are held against it. By default the file's.
        expect: By rule id, by `<rule id>/<concept id>`, or by `"*"` for every rule that the case does not name.
    """

    name: Words
    prompt: str
    negative: str = ""
    context: Mapping[ContextKey, Words] = {}
    task: Task | None = None
    now: Day | None = None
    expect: Annotated[Mapping[str, Annotated[Expected, BeforeValidator(_spelled_out)]], Field(min_length=1)]


class CaseFile(Strict):
    """A file of cases.

    Attributes:
        apiVersion: Version of this schema.
        kind: Always `PolicyTest`.
        policy: The policy under test: a path relative to this file, or the name of a shipped policy.
        now: The day on which its prompts come in; by default the day on which the test is run.
        cases: The cases; a file without any fails.
    """

    apiVersion: Literal["safegen.dev/v1"]  # noqa: N815 - the document's own spelling, as in Kubernetes
    kind: Literal["PolicyTest"]
    policy: Words
    now: Day | None = None
    cases: tuple[Case, ...] = ()


@dataclass(frozen=True, slots=True)
class Cases:
    """A file of cases, and where its parts stand."""

    path: Path
    content: CaseFile
    document: Document

    def place(self, index: int) -> Place:
        """Returns where a case stands."""
        return self.document.position(("cases", index))


def read_cases(path: Path) -> Cases:
    """Reads a file of policy tests.

    Raises:
        PolicyNotFoundError: It cannot be read.
        PolicySyntaxError: Not YAML, or YAML that safegen refuses.
        PolicyValidationError: Faults in the content; `problems` lists all.
    """
    document = read_document(path)
    content, problems = validate(CaseFile, document)
    if content is not None:
        problems += _between_cases(content, document)
    if problems or content is None:
        raise PolicyValidationError(in_document_order(problems))
    return Cases(path, content, document)


def unknown_rules(cases: Cases, policy: Policy, resolved: tuple[str, ...]) -> list[Problem]:
    """Returns a problem for each expectation of a rule that the policy has not.

    Args:
        cases: The cases.
        policy: The policy under test.
        resolved: The ids of its rules, categories expanded.
    """
    known: dict[str, Any] = dict.fromkeys((EVERY_RULE, *(rule.id for rule in policy.rules), *resolved))
    return [
        cases.document.problem(
            ("cases", index, "expect", name),
            f"policy {policy.metadata.id!r} has no rule {name!r}.{did_you_mean(name, known)}",
            key=True,
        )
        for index, case in enumerate(cases.content.cases)
        for name in case.expect
        if name not in known
    ]


def _between_cases(content: CaseFile, document: Document) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, case in enumerate(content.cases):
        if case.name in seen:
            yield document.problem(("cases", index, "name"), f"case {case.name!r} is there already; names are unique")
        seen.add(case.name)
        if EVERY_RULE in case.expect and case.expect[EVERY_RULE].opens:
            text = (
                f'"{EVERY_RULE}" stands for every rule, and no prompt touches all; expected shut, or a rule by its id'
            )
            yield document.problem(("cases", index, "expect", EVERY_RULE), text)
