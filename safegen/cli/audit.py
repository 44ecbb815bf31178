"""`safegen audit`: what a policy decides for the prompts of a file, without drawing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, TypedDict

import typer

from safegen.cli import options
from safegen.cli.describe import (
    DECISION_COLUMNS,
    DecisionValues,
    PolicyValues,
    decision_lines,
    decision_values,
    policy_values,
)
from safegen.cli.render import Column, Line, Sheet, json_text, progress, say, show, warn, write
from safegen.cli.unused import warn_of_unused
from safegen.errors import UsageError

if TYPE_CHECKING:
    from safegen.gatekeeper import Gatekeeper
    from safegen.policy.resolve import ResolvedPolicy

EXAMPLE = (
    "Examples: safegen audit --prompts prompts.txt --fail-on high\n\n"
    "safegen audit --prompts - --policy my-policy.yaml --json < prompts.txt"
)
BATCH = 64
FOUND = 1  # exit code


class FailOn(StrEnum):
    """The severities of `safegen.policy.schema.Severity`, which is not imported here so that `--help` stays quick."""

    INFO = "info"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Prompts: .txt (one a line), .csv or .jsonl; - for one a line from standard input."
    ),
]
Threshold = Annotated[
    FailOn | None,
    typer.Option(
        help="Exit with code 1 if a rule of this severity or above is touched.",
        show_default="never: exit 0 whatever is found",
    ),
]
ShowAll = Annotated[bool, typer.Option("--all", help="List shut membranes too, with their scores, for every prompt.")]
Explain = Annotated[
    bool, typer.Option("--explain", help="Find the tokens that open a membrane too; slower. They are in the JSON.")
]


def audit(
    ctx: typer.Context,
    prompts: Prompts = None,
    policy: options.PolicyName = None,
    model: options.Model = options.MINI,
    revision: options.Revision = None,
    fail_on: Threshold = None,
    show_all: ShowAll = False,
    explain: Explain = False,
    membranes: options.Membranes = None,
    context: options.Context = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what a policy decides for every prompt of a file, without drawing; or check an audit log (`verify`).

    Negative prompts in the file are not looked at: a concept named there is pushed away already.
    """
    if ctx.invoked_subcommand is not None:
        if prompts is not None:
            raise UsageError(f"--prompts does not go with `{ctx.invoked_subcommand}`; run the two one after the other")
        return
    if prompts is None:
        raise UsageError(
            "expected --prompts FILE (or --prompts -), to say what the policy decides for each prompt, or the command "
            "`safegen audit verify LOG`, to check an audit log"
        )
    from safegen.policy.load import load_policy

    name, caller = options.policy_for(policy, model), options.context_of(context)
    load_policy(name)  # for its faults, before the model is loaded
    with _spooled(prompts) as rows:
        highest = _audit(
            rows, name, model, revision, membranes or [], caller, show_all=show_all, explain=explain, as_json=as_json
        )
    severities = list(FailOn)
    if fail_on and highest and severities.index(FailOn(highest)) >= severities.index(fail_on):
        say(f"exit 1: a rule of severity {highest} is touched (--fail-on {fail_on})")
        raise typer.Exit(FOUND)


class Row(TypedDict):
    """One prompt of the file."""

    index: int
    line: int
    prompt: str


class Rows:
    """The prompts of a file whose faults have all been looked for, kept on disk."""

    def __init__(self, file: IO[str], count: int) -> None:
        self._file = file
        self.count = count

    def batches(self) -> Iterator[list[Row]]:
        """Yields the prompts in file order, `BATCH` at a time."""
        self._file.seek(0)
        batch: list[Row] = []
        for line in self._file:
            batch.append(json.loads(line))
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


@contextmanager
def _spooled(path: str) -> Generator[Rows]:
    """Reads a prompts file to its end before anything is decided or printed, so that a fault leaves no half output.

    The prompts wait in a temporary file and not in memory; standard input and pipes can be read only once.
    """
    from safegen.prompts import read_prompts

    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        count = 0
        for row in read_prompts(path):
            content: Row = {"index": row.index, "line": row.line, "prompt": row.text}
            file.write(json.dumps(content) + "\n")
            count += 1
        yield Rows(file, count)


def _audit(
    rows: Rows,
    policy: str,
    model: str,
    revision: str | None,
    membranes: Sequence[Path],
    context: Mapping[str, str],
    *,
    show_all: bool,
    explain: bool,
    as_json: bool,
) -> str | None:
    """Decides and prints; returns the highest severity that was touched."""
    from safegen.cli.host import load_host

    pipe = load_host(model, revision)

    from safegen.guard import prepare

    backend, resolved, gatekeeper = prepare(pipe, policy, membranes=membranes, context=context)
    notices = (*resolved.notices, *gatekeeper.notices)
    for notice in notices:
        warn(notice)
    warn_of_unused(membranes, resolved, backend.family)
    summary = Summary(gatekeeper.view())
    decided = _decided(rows, gatekeeper, summary, explain=explain)
    if as_json:
        _print_json(decided, summary, policy_values(resolved), backend.family, notices)
    else:
        _print_tables(decided, summary, show_all=show_all)
    return summary.highest


Decided = Iterable[list[tuple[Row, DecisionValues]]]


def _decided(rows: Rows, gatekeeper: Gatekeeper, summary: Summary, *, explain: bool) -> Decided:
    done = 0
    with progress("deciding", rows.count, beside=True) as step:
        for batch in rows.batches():
            decisions = gatekeeper.decide_texts([row["prompt"] for row in batch], evidence=explain or None)
            found = [decision_values(decision, gatekeeper.policy) for decision in decisions]
            summary.add(found)
            done += len(batch)
            step(done, "")
            yield list(zip(batch, found, strict=True))


def _print_json(decided: Decided, summary: Summary, policy: PolicyValues, family: str, notices: Sequence[str]) -> None:
    """Prints one JSON object, prompt by prompt, so that a long file needs no more memory than a short one."""
    head = {"policy": policy, "model": {"family": family}, "notices": list(notices)}
    write(json_text(head)[:-1] + ', "prompts": [')
    lead = "\n"
    for batch in decided:
        for row, decision in batch:
            write(lead + json_text({**row, **decision}))
            lead = ",\n"
    write('\n], "summary": ' + json_text(summary.values()) + "}\n")


def _print_tables(decided: Decided, summary: Summary, *, show_all: bool) -> None:
    sheet = Sheet(DECISION_COLUMNS)
    for batch in decided:
        lines: list[Line] = []
        for row, decision in batch:
            lines += decision_lines(row["line"], row["prompt"], decision, shut=show_all)
        if lines:
            sheet.add(lines)
    closed = summary.prompts - summary.touching
    show(f"{closed} of {summary.prompts} prompt{'s' if summary.prompts != 1 else ''} touch no rule")
    if summary.touching:
        columns = (Column("rule", share=1), Column("severity", width=8), Column("action", width=7))
        table = Sheet((*columns, Column("prompts", width=9)), "Rules that were touched", widest=80)
        table.add(
            Line((rule["id"], rule["severity"], rule["action"], str(rule["prompts"]))) for rule in summary.rules()
        )


class RuleValues(TypedDict):
    """How many prompts touch a rule; `action` is what is done to them on this base model."""

    id: str
    severity: str
    action: str
    prompts: int


class Summary:
    """Counts over many prompts."""

    def __init__(self, policy: ResolvedPolicy) -> None:
        """Starts at zero for every rule."""
        self.prompts = 0
        self.touching = 0
        self._outcomes = {"allow": 0, "flag": 0, "erase": 0, "refuse": 0}
        self._policy = policy
        self._fired: dict[str, int] = {}

    def add(self, decisions: Sequence[DecisionValues]) -> None:
        """Counts decisions."""
        for decision in decisions:
            self.prompts += 1
            self.touching += bool(decision["fired"])
            self._outcomes[decision["outcome"]] += 1
            for rule in decision["fired"]:
                self._fired[rule] = self._fired.get(rule, 0) + 1

    @property
    def highest(self) -> str | None:
        """The highest severity of a touched rule."""
        touched = [rule.severity for rule in self._policy.rules if rule.id in self._fired]
        return max(touched).value if touched else None

    def rules(self) -> list[RuleValues]:
        """Returns the touched rules, in the order of the policy."""
        return [
            {"id": r.id, "severity": r.severity.value, "action": r.effective, "prompts": self._fired[r.id]}
            for r in self._policy.rules
            if r.id in self._fired
        ]

    def values(self) -> dict[str, object]:
        """Returns the counts as plain values."""
        return {
            "prompts": self.prompts,
            "touching": self.touching,
            "outcomes": self._outcomes,
            "rules": self.rules(),
            "highest_severity": self.highest,
        }
