"""`safegen validate`: every fault of policy files, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypedDict

import typer

from safegen.cli import options
from safegen.cli.render import say, show, show_json
from safegen.errors import PolicyError, PolicySyntaxError, PolicyValidationError, Problem

EXAMPLE = "Example: safegen validate policies/strict.yaml policies/mini-strict.yaml"

Files = Annotated[
    list[str],
    typer.Argument(metavar="FILE...", help="Policy files, names of shipped policies, or folders of policy files."),
]


class ProblemValues(TypedDict):
    """One fault and its place; line and column count from 1, and are absent where a file cannot be read at all."""

    file: str
    line: int | None
    column: int | None
    message: str


class FileValues(TypedDict):
    """What was found in one policy file and in those that it extends."""

    file: str
    valid: bool
    problems: list[ProblemValues]


def validate(files: Files, as_json: options.AsJson = False) -> None:
    """Check policy files, with all that they extend, and list every fault of each; exit code 3 if there is one."""
    from safegen.policy.load import policy_files

    found = [_checked(path) for name in files for path in policy_files(name)]
    faulty = [one for one in found if not one["valid"]]
    if as_json:
        show_json({"valid": not faulty, "files": found})
    else:
        for one in found:
            if one["valid"]:
                show(f"{one['file']}: valid")
            for problem in one["problems"]:
                show(_line(problem))
    if faulty:
        faults = sum(len(one["problems"]) for one in faulty)
        say(f"{faults} fault{'s' if faults != 1 else ''} in {len(faulty)} of {len(found)} policies")
        raise typer.Exit(PolicyError.exit_code)


def _checked(path: Path) -> FileValues:
    from safegen.policy.load import check_policy

    problems: list[ProblemValues] = []
    try:
        problems = [_values(problem) for problem in check_policy(path)[1]]
    except (PolicySyntaxError, PolicyValidationError) as error:  # the latter of the concept catalogue
        problems = [_values(problem) for problem in error.problems]
    except PolicyError as error:
        problems = [{"file": str(path), "line": None, "column": None, "message": str(error)}]
    return {"file": str(path), "valid": not problems, "problems": problems}


def _values(problem: Problem) -> ProblemValues:
    file, line, column = problem.where.rsplit(":", 2)
    return {"file": file, "line": int(line), "column": int(column), "message": problem.message}


def _line(problem: ProblemValues) -> str:
    if problem["line"] is None:
        return problem["message"]
    return f"{problem['file']}:{problem['line']}:{problem['column']}: {problem['message']}"
