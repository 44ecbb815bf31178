"""`safegen lint`: what a valid policy may still get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegen.cli import options
from safegen.cli.render import say, show, show_json
from safegen.errors import PolicyNotFoundError, PolicyValidationError, Problem

if TYPE_CHECKING:
    from safegen.policy.lint import Finding, MembraneFacts

EXAMPLE = "Example: safegen lint strict --json"


class FailOnLevel(StrEnum):
    """The levels of lints, mildest first; typer shows them in the help."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


Paths = Annotated[list[str], typer.Argument(metavar="PATH…", help="Policies, folders, or names of shipped policies.")]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="FAMILY", help="Also look at the membranes installed for this base family."),
]
FailOn = Annotated[FailOnLevel, typer.Option("--fail-on", help="The mildest level that makes the exit code 1.")]


def lint(
    paths: Paths,
    base: Base = None,
    membranes: options.Membranes = None,
    fail_on: FailOn = FailOnLevel.WARNING,
    sarif: options.Sarif = None,
    as_json: options.AsJson = False,
) -> None:
    """Look for what a valid policy may still get wrong; docs/reference/lint.md explains each finding."""
    from safegen.policy.catalogue import load_catalogue
    from safegen.policy.context import utc_now
    from safegen.policy.lint import LEVELS, LINTS, subject_of
    from safegen.policy.lint import lint as found_in

    catalogue, today = load_catalogue(), utc_now().date()
    facts = _membrane_facts(base, membranes or []) if base is not None else {}
    findings: list[Finding] = []
    problems: list[Problem] = []
    files = _policies(paths)
    for path in files:
        try:
            subject = subject_of(path, catalogue, today)
        except PolicyValidationError as error:
            problems += error.problems
            continue
        findings += found_in(replace(subject, base=base, membranes=facts))
    if problems:
        raise PolicyValidationError(dict.fromkeys(problems))
    if sarif is not None:
        from safegen.cli.reports import Reported, write_sarif

        reported = [
            Reported(one.lint, one.level, one.message, Path(one.place.source), one.place.line, one.place.column)
            for one in findings
        ]
        write_sarif(sarif, {one.id: one.summary for one in LINTS}, reported)
    failed = any(LEVELS.index(one.level) >= LEVELS.index(fail_on.value) for one in findings)
    if as_json:
        show_json(
            {"ok": not failed, "files": [str(path) for path in files], "findings": [_values(one) for one in findings]}
        )
    else:
        for one in findings:
            show(f"{one.place}: {one.level} {one.lint}: {one.message}")
        say(f"{len(files)} {'policy' if len(files) == 1 else 'policies'}, {len(findings)} findings")
    if failed:
        raise typer.Exit(1)


def _policies(paths: Sequence[str]) -> list[Path]:
    from safegen.policy.load import find_policy
    from safegen.policy.testing import policies_in

    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        inside = policies_in(path) if path.is_dir() else [find_policy(given)]
        if not inside:
            raise PolicyNotFoundError(f"{path}: no policy (kind: Policy) in this folder")
        found |= dict.fromkeys(inside)
    return list(found)


def _membrane_facts(base: str, membranes: Sequence[Path]) -> dict[str, MembraneFacts]:
    """Reads every membrane that is installed for a base family."""
    from safegen.bundle.store import MembraneStore
    from safegen.membrane.file import read_with_digest
    from safegen.policy.lint import MembraneFacts

    facts: dict[str, MembraneFacts] = {}
    for concept, path in MembraneStore(membranes).installed(base).items():
        membrane, digest = read_with_digest(path)
        card = path.with_name("card.md")
        text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
        facts[concept] = MembraneFacts(path, digest, membrane.base, text)
    return facts


def _values(finding: Finding) -> dict[str, object]:
    return {
        "lint": finding.lint,
        "level": finding.level,
        "file": finding.place.source,
        "line": finding.place.line,
        "column": finding.place.column,
        "message": finding.message,
    }
