"""What the tests of the command line share: a folder with everything the commands need, and how to read a complaint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typer.testing import Result

from safegen.bundle.store import MEMBRANE_FILE

HEAD = "apiVersion: safegen.dev/v1\nkind: Policy\nmetadata: {id: tiny, version: 1.0.0}\nrules:\n"
GHOST = "  - {id: no-ghosts, concept: ghost, category: ip-character, severity: high}\n"
ROBOT = "  - {id: no-robots, concept: robot, category: ip-character, severity: critical, action: refuse}\n"
FOX = "  - {id: see-foxes, concept: fox, category: object, severity: low, action: flag}\n"


@dataclass(frozen=True)
class World:
    """Paths, as the command line takes them."""

    root: Path
    family: str

    @property
    def pipeline(self) -> str:
        return str(self.root / "pipeline")

    @property
    def membranes(self) -> str:
        return str(self.root / "membranes")

    @property
    def policy(self) -> str:
        return str(self.root / "policy.yaml")

    @property
    def prompts(self) -> str:
        return str(self.root / "prompts.txt")

    @property
    def ghost(self) -> Path:
        return self.root / "membranes" / self.family / "ghost" / MEMBRANE_FILE

    @property
    def host(self) -> list[str]:
        """Options of a command that takes model, policy and membranes."""
        return ["--model", self.pipeline, "--policy", self.policy, "--membranes", self.membranes]


Run = Callable[..., Result]


def complaint(result: Result) -> str:
    """Returns the error message of a run; asserts that there is one, and nothing else to confuse a reader."""
    lines = result.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    start = next(k for k, line in enumerate(lines) if line.startswith("error: "))
    return "\n".join(lines[start:])
