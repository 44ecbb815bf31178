"""`safegen test` and `safegen lint`: what they print, what they write for build servers, how they exit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from cli_world import FOX, GHOST, HEAD, ROBOT, Run, World, complaint

import safegen
from safegen.cli.lint import FailOnLevel
from safegen.policy.lint import LEVELS, LINTS

CASES = """\
apiVersion: safegen.dev/v1
kind: PolicyTest
policy: tiny.yaml
cases:
  - {name: ghosts, prompt: a ghost, expect: {no-ghosts: erase}}
  - {name: robots, prompt: a robot, expect: {no-robots: refuse}}
  - {name: foxes, prompt: a fox, expect: {see-foxes: flag}}
  - {name: plain, prompt: the van, expect: {"*": shut}}
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(HEAD + GHOST + ROBOT + FOX, "utf-8")
    (tmp_path / "tiny.policytest.yaml").write_text(CASES, "utf-8")
    return path


def fails(policy: Path) -> Path:
    cases = policy.with_name("tiny.policytest.yaml")
    cases.write_text(CASES.replace("the van", '"a ghost\\u0007"').replace("a fox, expect", "a van, expect"), "utf-8")
    return cases


def test_passing_cases(run: Run, policy: Path) -> None:
    result = run("test", policy)
    assert result.exit_code == 0, result.stderr
    assert "tiny.policytest.yaml: 4 cases, 0 failed; 3 of 3 rules covered" in result.stdout
    assert result.stderr == "4 cases, 4 passed, 0 failed; 100 % of the rules covered\n"


def test_failing_cases_are_named_with_their_places(run: Run, policy: Path) -> None:
    cases = fails(policy)
    result = run("test", policy.parent)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == f"{cases}:7:5: foxes: see-foxes: expected flag, but the rule is not touched"
    assert lines[1] == f"{cases}:8:5: plain: *: expected shut, found erase by no-ghosts (ghost)"


def test_json_says_the_same(run: Run, policy: Path) -> None:
    fails(policy)
    result = run("test", policy, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["ok"], found["coverage"]) == (False, 100)
    (suite,) = found["suites"]
    assert [(c["name"], c["passed"], c["line"]) for c in suite["cases"]] == [
        ("ghosts", True, 5), ("robots", True, 6), ("foxes", False, 7), ("plain", False, 8),
    ]  # fmt: skip
    assert suite["rules"][0] == {"rule": "no-ghosts", "opening": 1, "closing": 1, "covered": True}


def test_junit(run: Run, policy: Path, tmp_path: Path) -> None:
    fails(policy)
    assert run("test", policy, "--junit", tmp_path / "report.xml").exit_code == 1
    root = Xml.fromstring((tmp_path / "report.xml").read_text("utf-8"))
    assert (root.tag, root.get("tests"), root.get("failures")) == ("testsuites", "7", "2")
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("7", "2", "0")
    assert [case.get("name") for case in suite if len(case)] == ["foxes", "plain"]
    assert [case.get("name") for case in suite][4:] == [
        "coverage of rule no-ghosts", "coverage of rule no-robots", "coverage of rule see-foxes",
    ]  # fmt: skip
    failure = suite[3][0]
    assert failure.get("message") == "*: expected shut, found erase by no-ghosts (ghost)"


def check_sarif(log: dict[str, Any]) -> list[dict[str, Any]]:
    """Asserts what SARIF 2.1.0 (OASIS, 3.13 to 3.30) requires of a log with one run; returns the results."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "safegen"
    assert run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
    ids = [rule["id"] for rule in driver["rules"]]
    assert len(ids) == len(set(ids))
    assert all(rule["shortDescription"]["text"] for rule in driver["rules"])
    for result in run["results"]:
        assert result["message"]["text"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert ids[result["ruleIndex"]] == result["ruleId"]
        (location,) = result["locations"]
        place = location["physicalLocation"]
        assert " " not in place["artifactLocation"]["uri"]
        assert not place["artifactLocation"]["uri"].startswith("/")
        assert place["region"]["startLine"] >= 1
        assert place["region"]["startColumn"] >= 1
    return run["results"]


def test_sarif(run: Run, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(policy)
    monkeypatch.chdir(tmp_path)
    assert run("test", policy, "--sarif", tmp_path / "report.sarif").exit_code == 1
    results = check_sarif(json.loads((tmp_path / "report.sarif").read_text("utf-8")))
    assert [(r["ruleId"], r["locations"][0]["physicalLocation"]["region"]["startLine"]) for r in results] == [
        ("case-failed", 7), ("case-failed", 8),
    ]  # fmt: skip
    assert results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "tiny.policytest.yaml"


def test_no_cases_is_a_failure(run: Run, policy: Path, tmp_path: Path) -> None:
    policy.with_name("tiny.policytest.yaml").write_text(CASES.partition("cases:")[0], "utf-8")
    result = run("test", policy, "--fail-under", "0", "--junit", tmp_path / "r.xml", "--sarif", tmp_path / "r.sarif")
    assert result.exit_code == 1
    assert "policy 'tiny' has no test cases" in result.stdout
    assert Xml.fromstring((tmp_path / "r.xml").read_text("utf-8")).get("failures") == "1"
    assert [r["ruleId"] for r in check_sarif(json.loads((tmp_path / "r.sarif").read_text("utf-8")))] == ["no-cases"]
    policy.with_name("tiny.policytest.yaml").unlink()
    assert run("test", policy.parent).exit_code == 1


def test_rules_that_are_not_covered_fail_unless_less_is_asked(run: Run, policy: Path) -> None:
    cases = policy.with_name("tiny.policytest.yaml")
    cases.write_text("".join(line for line in CASES.splitlines(keepends=True) if "foxes" not in line), "utf-8")
    result = run("test", policy)
    assert result.exit_code == 1
    assert f"{cases}:1:1: rule 'see-foxes' is not covered: no case opens it" in result.stdout
    assert run("test", policy, "--fail-under", "60").exit_code == 0
    assert run("test", policy, "--fail-under", "67").exit_code == 1


def test_the_whole_gate_of_a_model(run: Run, policy: Path, world: World) -> None:
    options = ["--model", world.pipeline, "--membranes", world.membranes]
    result = run("test", policy, options, "--json")
    assert result.exit_code == 0, result.stdout + result.stderr
    cases = policy.with_name("tiny.policytest.yaml")
    cases.write_text(CASES.replace("{no-ghosts: erase}", '{no-ghosts: {permeability: "<1"}}'), "utf-8")
    assert "no-ghosts: expected permeability < 1, found 1.000" in run("test", policy, options).stdout


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (("policy: tiny.yaml", "policy: other.yaml"), 3, "other.yaml: neither a file nor a shipped policy"),
        (("no-ghosts", "no-ghost"), 3, "policy 'tiny' has no rule 'no-ghost'. Did you mean 'no-ghosts'?"),
        (("cases:", "cases: &a"), 3, "anchor &a is refused"),
    ],
)
def test_faults_of_cases_exit_3(run: Run, policy: Path, change: tuple[str, str], code: int, message: str) -> None:
    policy.with_name("tiny.policytest.yaml").write_text(CASES.replace(*change), "utf-8")
    result = run("test", policy.parent)
    assert result.exit_code == code
    assert message in complaint(result)


def test_lint(run: Run, policy: Path, tmp_path: Path) -> None:
    result = run("lint", policy)
    assert (result.exit_code, result.stdout) == (0, ""), result.stdout
    assert result.stderr == "1 policy, 0 findings\n"
    policy.write_text(
        (HEAD + GHOST + ROBOT + FOX).replace("severity: high", "severity: high, on_missing: flag"), "utf-8"
    )
    policy.with_name("tiny.policytest.yaml").unlink()
    result = run("lint", policy.parent, "--sarif", tmp_path / "lint.sarif")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{policy}:5:10: warning SG001: rule 'no-ghosts' has no test case")
    assert any(line.startswith(f"{policy}:5:89: error SG003: ") for line in lines), lines
    results = check_sarif(json.loads((tmp_path / "lint.sarif").read_text("utf-8")))
    assert [r["ruleId"] for r in results] == ["SG001", "SG003", "SG001", "SG001"]
    found = json.loads(run("lint", policy, "--json").stdout)
    assert not found["ok"]
    assert found["findings"][1] | {"message": ""} == {
        "lint": "SG003", "level": "error", "file": str(policy), "line": 5, "column": 89, "message": "",
    }  # fmt: skip


def test_lint_fails_on_the_level_that_is_asked_for(run: Run, policy: Path) -> None:
    policy.with_name("tiny.policytest.yaml").unlink()
    assert run("lint", policy).exit_code == 1
    assert run("lint", policy, "--fail-on", "error").exit_code == 0
    assert run("lint", policy, "--fail-on", "note").exit_code == 1
    assert {one.level for one in LINTS} == {level.value for level in FailOnLevel} == set(LEVELS)


def test_lint_looks_at_membranes_of_a_base(run: Run, policy: Path, world: World) -> None:
    result = run("lint", policy, "--base", world.family, "--membranes", world.membranes)
    assert result.exit_code == 1
    assert "SG004: the membrane of 'ghost'" in result.stdout
    assert run("lint", "mini-strict", "--base", "mini").exit_code == 0


def test_lint_refuses_what_is_no_policy(run: Run, policy: Path, tmp_path: Path) -> None:
    policy.write_text(HEAD + GHOST.replace("severity: high", "severity: hihg"), "utf-8")
    result = run("lint", policy)
    assert result.exit_code == 3
    assert "unknown severity 'hihg'" in complaint(result)
    (tmp_path / "empty").mkdir()
    assert run("lint", tmp_path / "empty").exit_code == 3
    assert run("lint", "stric").exit_code == 3


@pytest.mark.parametrize("command", ["test", "lint"])
def test_they_start_without_torch(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['safegen', '{command}', 'explicit-only']\n"
        "from safegen.cli.app import app\n"
        "try:\n    app()\nexcept SystemExit as done:\n"
        "    print(done.code, {'torch', 'numpy', 'diffusers', 'transformers'} & sys.modules.keys())"
    )
    env = os.environ | {"PYTHONPATH": str(Path(safegen.__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert result.stdout.splitlines()[-1] == "0 set()", result.stdout + result.stderr
