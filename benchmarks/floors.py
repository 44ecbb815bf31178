"""What every benchmark ends with: numbers held against their floors, one JSON object, and an exit code."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console

console = Console(stderr=True)


@dataclass(frozen=True)
class Floor:
    """A number that the issue names: what was measured, and whether it holds."""

    name: str
    value: float
    bound: Literal["at least", "at most"]
    floor: float
    holds: bool

    @classmethod
    def at_least(cls, name: str, value: float, floor: float) -> Floor:
        """A number that must not be lower."""
        return cls(name, round(value, 4), "at least", floor, value >= floor)

    @classmethod
    def at_most(cls, name: str, value: float, floor: float) -> Floor:
        """A number that must not be higher."""
        return cls(name, round(value, 4), "at most", floor, value <= floor)


def command(script: str) -> str:
    """Returns the command that runs a benchmark as it runs now; `script` is its `__file__`."""
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]])


def finish(report: Mapping[str, Any], floors: Sequence[Floor], *, as_json: bool) -> None:
    """Prints a benchmark's report and what its floors say.

    Args:
        report: Facts and figures, without the floors.
        floors: The numbers that an issue names, missed ones too.
        as_json: Whether to print the report, with the floors, as one JSON object on stdout.

    Raises:
        typer.Exit: With code 1 where a floor is missed.
    """
    if as_json:
        sys.stdout.write(json.dumps({**report, "floors": [vars(floor) for floor in floors]}, indent=1) + "\n")
    for floor in floors:
        verdict = "holds " if floor.holds else "MISSED"
        console.print(f"{verdict} {floor.name}: {floor.value} ({floor.bound} {floor.floor:g})", soft_wrap=True)
    if not all(floor.holds for floor in floors):
        raise typer.Exit(1)
