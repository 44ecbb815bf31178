"""The commands that work on policy files alone: init, validate, fmt, diff, schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_world import FOX, GHOST, HEAD, ROBOT, Run, World, complaint

from safegen.policy.json_schema import schema_text
from safegen.policy.load import load_policy, policy_files

FAULTY = HEAD + GHOST.replace("high", "hgih") + "ruels: 1\n"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(HEAD + GHOST, encoding="utf-8")
    return path


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    path = tmp_path / "faulty.yaml"
    path.write_text(FAULTY, encoding="utf-8")
    return path


def test_validate_lists_every_fault_of_every_file(run: Run, policy: Path, faulty: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: &x 1\nb: *x\n", encoding="utf-8")
    result = run("validate", policy, faulty, broken, "strict")
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert lines[0] == f"{policy}: valid"
    assert lines[1].startswith(f"{faulty}:5:71: unknown severity 'hgih'. Did you mean 'high'?")
    assert lines[2].startswith(f"{faulty}:6:1: unknown key 'ruels'. Did you mean 'rules'?")
    assert lines[3].startswith(f"{broken}:1:4: anchor &x is refused")
    assert lines[4].startswith(f"{broken}:2:4: alias *x is refused")
    assert lines[5].endswith("strict.yaml: valid")
    assert result.stderr == "4 faults in 2 of 4 policies\n"


def test_validate_as_data(run: Run, policy: Path, faulty: Path) -> None:
    result = run("validate", policy, faulty, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["valid"]) == (3, False)
    assert [file["valid"] for file in found["files"]] == [True, False]
    first = found["files"][1]["problems"][0]
    assert (first["file"], first["line"], first["column"]) == (str(faulty), 5, 71)
    assert first["message"].startswith("unknown severity")
    assert json.loads(run("validate", policy, "--json").stdout) == {
        "valid": True,
        "files": [{"file": str(policy), "valid": True, "problems": []}],
    }


def test_validate_follows_extends_and_names_the_file_at_fault(run: Run, faulty: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(HEAD.replace("rules:\n", "extends: faulty.yaml\n"), encoding="utf-8")
    result = run("validate", child)
    assert result.exit_code == 3
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == [f"{faulty}:5:71", f"{faulty}:6:1"]


def test_validate_takes_folders_without_their_tests(run: Run, policy: Path, tmp_path: Path) -> None:
    (tmp_path / "p.policytest.yaml").write_text("kind: PolicyTest\n", encoding="utf-8")
    assert run("validate", tmp_path).stdout == f"{policy}: valid\n"
    (tmp_path / "empty").mkdir()
    empty = run("validate", tmp_path / "empty")
    assert empty.exit_code == 3
    assert "expected policy files (*.yaml) in this folder, found none" in complaint(empty)


def test_validate_of_nothing_there(run: Run) -> None:
    result = run("validate", "stricct")
    assert result.exit_code == 3
    assert "stricct: neither a file nor a shipped policy. Did you mean 'strict'?" in complaint(result)


def test_fmt_writes_and_checks(run: Run, policy: Path) -> None:
    tidy = policy.read_text("utf-8")
    policy.write_text(tidy.replace("rules:\n  - ", "rules:\n-   ") + "# kept\n", encoding="utf-8")
    policy.chmod(0o640)
    untidy = policy.read_bytes()
    checked = run("fmt", "--check", policy)
    assert (checked.exit_code, checked.stdout, policy.read_bytes()) == (1, f"{policy}\n", untidy)
    assert run("fmt", policy).exit_code == 0
    assert policy.read_text("utf-8") == tidy + "# kept\n"
    assert policy.stat().st_mode & 0o777 == 0o640
    again = run("fmt", "--check", policy)
    assert (again.exit_code, again.stdout, again.stderr) == (0, "", "0 of 1 files would be laid out anew\n")
    assert [path.name for path in policy.parent.iterdir()] == ["p.yaml"]


def test_fmt_of_one_bad_file_changes_none(run: Run, policy: Path, tmp_path: Path) -> None:
    untidy = policy.read_text("utf-8").replace("rules:\n  - ", "rules:\n-   ")
    policy.write_text(untidy, encoding="utf-8")
    (tmp_path / "z.yaml").write_text("a: [\n", encoding="utf-8")
    result = run("fmt", tmp_path)
    assert result.exit_code == 3
    assert "z.yaml:2:1: not YAML" in complaint(result)
    assert policy.read_text("utf-8") == untidy


def test_diff_in_words_and_exit_codes(run: Run, policy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(HEAD + GHOST.replace("}", ", strength: 0.5}") + FOX, encoding="utf-8")
    result = run("diff", policy, other)
    assert result.stdout.splitlines() == [
        f"looser    rule no-ghosts: strength 1 → 0.5 ({other}:5)",
        f"stricter  rule see-foxes: is new: flag fox ({other}:6)",
    ]
    assert (result.exit_code, result.stderr) == (0, "1 stricter, 1 looser, 0 different\n")
    codes = [run("diff", old, new, "--fail-on", on).exit_code for old, new, on in (
        (policy, other, "looser"), (other, policy, "looser"), (policy, policy, "any"), (other, policy, "any"),
    )]  # fmt: skip
    assert codes == [1, 1, 0, 1]
    same = run("diff", policy, policy, "--json")
    assert json.loads(same.stdout) == {"differences": [], "prompts": None}


def test_diff_finds_the_prompts_that_are_decided_otherwise(run: Run, world: World, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(HEAD + GHOST + ROBOT.replace("refuse", "flag"), encoding="utf-8")
    host = ["--model", world.pipeline, "--membranes", world.membranes, "--prompts", world.prompts]
    result = run("diff", world.policy, other, *host, "--json")
    changes = json.loads(result.stdout)["prompts"]
    assert [(c["line"], c["old"]["outcome"], c["new"]["outcome"]) for c in changes] == [
        (2, "erase", "erase"),  # a fox is no longer flagged beside the ghost
        (3, "refuse", "flag"),
    ]
    shown = run("diff", world.policy, other, *host, "--fail-on", "any")
    assert shown.exit_code == 1
    assert "2 prompts are decided otherwise" in shown.stderr
    assert "a robot" in shown.stdout


def test_diff_loads_only_the_text_side(world: World) -> None:
    from safegen.backend.loading import load_pipeline

    pipe = load_pipeline(world.pipeline, text_only=True)
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}
    assert pipe.vae is None
    assert {parameter.device.type for parameter in pipe.text_encoder.parameters()} == {"cpu"}


def test_schema_is_what_is_published(run: Run) -> None:
    assert run("schema").stdout == schema_text("2020-12")
    assert run("schema", "--draft", "draft-07").stdout == schema_text("draft-07")


def test_init_writes_a_policy_that_is_valid_and_laid_out(run: Run, tmp_path: Path) -> None:
    result = run("init", tmp_path / "new", "--name", "house")
    names = ["house.yaml", "house.policytest.yaml", "policy.v1.draft-07.json"]
    assert result.stdout.splitlines() == [str(tmp_path / "new" / name) for name in names]
    policy = tmp_path / "new" / "house.yaml"
    assert run("validate", policy).exit_code == 0
    assert run("fmt", "--check", tmp_path / "new").exit_code == 0
    assert (load_policy(policy).metadata.id, load_policy(policy).mode) == ("house", "observe")
    assert policy.read_text("utf-8").splitlines()[0].endswith(f"$schema=./{names[2]}")
    assert policy_files(tmp_path / "new") == [policy]


def test_what_init_writes_passes_its_own_tests_and_lints(run: Run, tmp_path: Path) -> None:
    run("init", tmp_path)
    tested = run("test", tmp_path)
    assert tested.exit_code == 0
    assert "100 % of the rules covered" in tested.output
    linted = run("lint", tmp_path)
    assert (linted.exit_code, linted.output.strip()) == (0, "1 policy, 0 findings")


def test_the_exception_in_the_scaffold_is_valid_once_its_comment_signs_are_gone(run: Run, tmp_path: Path) -> None:
    run("init", tmp_path)
    policy = tmp_path / "house.yaml"
    head, tail = policy.read_text("utf-8").split("# exceptions:")
    policy.write_text(head + "exceptions:" + tail.replace("\n# ", "\n"), encoding="utf-8")
    assert load_policy(policy).exceptions[0].when == {"tenant": ("med-atlas",)}


def test_init_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "house.yaml").write_text("mine", encoding="utf-8")
    result = run("init", tmp_path)
    assert result.exit_code == 2
    assert "house.yaml is there already, and init overwrites nothing" in complaint(result)
    assert [path.name for path in tmp_path.iterdir()] == ["house.yaml"]
    assert "expected kebab case" in complaint(run("init", tmp_path, "--name", "My Policy"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tenant"], "--context tenant: expected KEY=VALUE (like tenant=acme), found something else"),
        (["tenant=a", "tenant=b"], "--context tenant=b: expected KEY=VALUE (like tenant=acme), found a key that was"),
        (["task=drawing"], "unknown task 'drawing'"),
        (["Tenant=a"], "expected names such as tenant, found 'Tenant'"),
    ],
)
def test_contexts_on_the_command_line_are_checked(run: Run, world: World, given: list[str], message: str) -> None:
    options = [word for item in given for word in ("--context", item)]
    result = run("explain", "--prompt", "a ghost", *world.host, *options)
    assert result.exit_code == 2
    assert message in complaint(result)


def test_explain_says_where_settings_are_stated(run: Run, world: World) -> None:
    result = run("explain", "--prompt", "a ghost", *world.host)
    assert f"rule no-ghosts: severity stated at {world.policy}:5" in result.stdout
    found = json.loads(run("explain", "--prompt", "a robot", *world.host, "--json").stdout)
    assert found["stated"]["no-robots"]["action"] == f"{world.policy}:6"
    assert (found["verdict"], found["action"]) == ("match", {"type": "refuse", "enforced": True, "would": None})


@pytest.mark.parametrize("command", [["validate", "strict"], ["schema"], ["diff", "strict", "mini-strict"], ["--help"]])
def test_policy_commands_start_without_the_libraries_that_draw(command: list[str], tmp_path: Path) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'safetensors', 'numpy', 'PIL'}"
    code = (
        "import sys\nfrom safegen.cli.app import app\n"
        f"try:\n    app({command!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print(sorted({heavy} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stderr.splitlines()[-1] == "[]"
