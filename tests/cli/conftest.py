"""Fixtures of the command line's tests: a tiny pipeline with membranes, policies and prompts, and a runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_world import FOX, GHOST, HEAD, ROBOT, Run, World
from tiny import random_membrane, tiny_sd
from typer.testing import CliRunner, Result

from safegen.backend import backend_of
from safegen.cli.app import app
from safegen.membrane.file import write_membrane


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    pipe = tiny_sd()
    pipe.save_pretrained(root / "pipeline")
    made = World(root, backend_of(pipe).family)
    write_membrane(random_membrane(pipe, "ghost"), made.ghost)
    Path(made.policy).write_text(HEAD + GHOST + ROBOT + FOX, "utf-8")
    Path(made.prompts).write_text("a ghost\na fox and a ghost\na robot\nthe van\n\na photo of a mouse\n", "utf-8")
    return made


@pytest.fixture
def run() -> Run:
    """Runs the command line; stdout and stderr are kept apart."""

    def call(*args: str | Path | Sequence[str], stdin: str | bytes | None = None) -> Result:
        words = [word for arg in args for word in ([str(arg)] if isinstance(arg, str | Path) else arg)]
        return CliRunner().invoke(app, words, input=stdin)

    return call
