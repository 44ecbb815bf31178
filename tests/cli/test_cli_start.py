"""The command line as such: quick to start, clear when something is wrong, silent where it should be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_world import Run, World, complaint

import safegen
from safegen.cli import audit_verify, render
from safegen.cli.audit import FailOn
from safegen.policy.schema import Severity
from safegen.training.config import TrainConfig

AUDIT = ("verify", "key", "tail", "show", "find", "export", "merge", "prune")
COMMANDS = (
    "demo", "generate", "audit", *(f"audit {name}" for name in AUDIT), "train", "convert", "calibrate", "explain",
    "inspect", "init", "validate", "fmt", "diff", "schema", "test", "lint",
)  # fmt: skip


def process(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user's shell would: a process of its own, no terminal."""
    env = os.environ | {"PYTHONPATH": str(Path(safegen.__file__).parent.parent)} | environment
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, check=False)


MAIN = "import sys; sys.argv[0] = 'safegen'; from safegen.cli.app import main; main()"


def test_starting_imports_nothing_heavy() -> None:
    code = "import sys, safegen.cli.app; print({'torch', 'diffusers', 'transformers', 'PIL'} & sys.modules.keys())"
    assert process("-c", code).stdout == "set()\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_of_the_command(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"safegen {command} " in result.stdout.partition("Example")[2]


def test_root_help_explains_exit_codes(run: Run) -> None:
    text = " ".join(run("--help").stdout.split())
    assert "Example: safegen demo" in text
    assert "3 invalid policy; 4 integrity" in text


def test_train_help_shows_the_true_defaults(run: Run) -> None:
    text = run("train", "--help").stdout.replace("│", "")
    for name in ("iterations", "eta", "anchoring", "anchors", "rank", "learning_rate", "seed"):
        entry = text.partition(f"--{name.replace('_', '-')} ")[2].partition("--")[0]
        assert f"({TrainConfig.model_fields[name].default})" in entry, name


def test_severities_are_those_of_policies() -> None:
    assert [level.value for level in FailOn] == [level.value for level in Severity]


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"safegen {safegen.__version__}\n"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["drive"], "No such command"),
        (["generate"], "Missing argument"),
        (["generate", "a ghost", "--steps", "0"], "--steps"),
        (["audit", "--fail-on", "huge"], "--fail-on"),
        (["demo", "--seed", "many"], "--seed"),
        (["train"], "--concept"),
    ],
)
def test_usage_faults_exit_2(run: Run, args: list[str], expected: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert result.stdout == ""


def test_audit_without_anything_to_do_says_what_to_give(run: Run) -> None:
    result = run("audit")
    assert result.exit_code == 2
    assert "--prompts FILE" in complaint(result)
    assert "safegen audit verify LOG" in complaint(result)


def test_prompts_do_not_go_with_verify(run: Run, world: World) -> None:
    result = run("audit", "--prompts", world.prompts, "verify", world.root)
    assert result.exit_code == 2
    assert "does not go with" in complaint(result)


def fall_over(*_: object, **__: object) -> None:
    raise ZeroDivisionError("a fault of ours\nwith a second line")


def test_internal_faults_exit_5_in_one_line(run: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safegen.audit.verify", fall_over)
    result = run("audit", "verify", world.root)
    assert result.exit_code == 5
    assert complaint(result).splitlines() == [
        "error: unexpected ZeroDivisionError: a fault of ours (`safegen --debug …` or SAFEGEN_DEBUG=1 shows where)"
    ]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(run: Run, world: World, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("safegen.audit.verify", fall_over)
    if how == "environment":
        monkeypatch.setenv("SAFEGEN_DEBUG", "1")
    result = run(*(["--debug"] if how == "option" else []), "audit", "verify", world.root)
    assert result.exit_code == 5
    assert "Traceback" in result.stderr
    assert Path(audit_verify.__file__).name in result.stderr


def test_libraries_are_silent_and_stdout_holds_only_data(world: World) -> None:
    args = ["audit", "--prompts", world.prompts, *world.host, "--json"]
    result = process("-c", MAIN, *args, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0
    assert result.stderr == f"loading {world.pipeline} …\n"
    assert result.stdout.startswith("{")
    assert result.stdout.isascii()


def test_what_does_not_print_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    render.Sheet([render.Column("prompt", share=1)]).add([render.Line(("red \x1b[31m \u202egnp",))])
    render.fail("first \x1b[2J\nsecond [bold]line[/bold]")
    shown = capsys.readouterr()
    assert "red \\x1b[31m \\u202egnp" in shown.out
    assert shown.err == "error: first \\x1b[2J\nsecond [bold]line[/bold]\n"


def test_no_colour_and_no_bars_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with render.progress("training", 20, lines=True) as step:
        for done in range(1, 21):
            step(done, "loss 1")
    render.warn("look")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [f"training {done}/20  loss 1  0 s left" for done in range(2, 21, 2)] + [
        "warning: look"
    ]
