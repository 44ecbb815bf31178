"""`safegen audit`: the same numbers for people and for programs, for any number of prompts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_world import GHOST, HEAD, Run, World

from safegen.cli import audit

TITLES = ("line", "prompt", "action", "rule", "membrane", "γ", "score", "lo", "lexical")


def audited(run: Run, world: World, *args: str) -> dict[str, Any]:
    result = run("audit", "--prompts", world.prompts, world.host, "--json", *args)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_json_says_who_decided_what(run: Run, world: World) -> None:
    found = audited(run, world)
    assert found["policy"]["id"] == "tiny"
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", found["policy"]["digest"])
    assert found["model"] == {"family": world.family}
    rows = [(p["index"], p["line"], p["prompt"], p["outcome"], p["rule"], p["fired"]) for p in found["prompts"]]
    assert rows == [
        (0, 1, "a ghost", "erase", "no-ghosts", ["no-ghosts"]),
        (1, 2, "a fox and a ghost", "erase", "no-ghosts", ["no-ghosts", "see-foxes"]),
        (2, 3, "a robot", "refuse", "no-robots", ["no-robots"]),
        (3, 4, "the van", "allow", None, []),
        (4, 6, "a photo of a mouse", "allow", None, []),
    ]
    ghost = found["prompts"][0]["membranes"][0]
    assert (ghost["action"], ghost["similar_to"]) == ("erase", None)
    assert found["prompts"][3]["membranes"][0]["action"] == "allow"
    assert [hit["action"] for hit in found["prompts"][1]["hits"]] == ["erase", "flag"]
    assert (ghost["opened"], ghost["permeability"], ghost["lexical"], ghost["words"]) == (True, 1.0, 1.0, ["ghost"])
    assert ghost["triggers"] == [
        {"start": 2, "end": 7, "text": "ghost", "by": "lexical", "weight": 1.0, "normalised": []}
    ]
    assert ghost["thresholds"] == {"direction": {"lo": 0.99, "hi": 1.0}}
    assert found["summary"] == {
        "prompts": 5,
        "touching": 3,
        "outcomes": {"allow": 2, "flag": 0, "erase": 2, "refuse": 1},
        "rules": [
            {"id": "no-ghosts", "severity": "high", "action": "erase", "prompts": 2},
            {"id": "no-robots", "severity": "critical", "action": "refuse", "prompts": 1},
            {"id": "see-foxes", "severity": "low", "action": "flag", "prompts": 1},
        ],
        "highest_severity": "critical",
    }


def test_table_has_the_numbers_of_the_json(run: Run, world: World) -> None:
    found = audited(run, world)
    lines = run("audit", "--prompts", world.prompts, world.host).stdout.splitlines()
    for prompt in found["prompts"][:2]:
        (line,) = [line for line in lines if re.match(rf" +{prompt['line']} +{prompt['prompt']} ", line)]
        (membrane,) = [m for m in prompt["membranes"] if m["opened"]]
        limits = membrane["thresholds"]["direction"]
        numbers = [membrane["permeability"], membrane["direction"], limits["lo"], membrane["lexical"]]
        assert re.findall(r"\d\.\d{3}", line) == [f"{number:.3f}" for number in numbers]
        for word in (prompt["outcome"], prompt["rule"], *membrane["words"]):
            assert word in line
    assert "2 of 5 prompts touch no rule" in lines
    for rule in found["summary"]["rules"]:
        pattern = rf"{rule['id']} +{rule['severity']} +{rule['action']} +{rule['prompts']}"
        assert any(re.fullmatch(pattern, line.strip()) for line in lines)


def test_explaining_finds_the_tokens(run: Run, world: World) -> None:
    plain, explained = (audited(run, world, *args) for args in ([], ["--explain"]))
    kinds = [[t["by"] for t in p["prompts"][1]["membranes"][0]["triggers"]] for p in (plain, explained)]
    assert kinds[0] == ["lexical"]
    assert kinds[1][0] == "lexical"
    assert set(kinds[1][1:]) == {"evidence"}


def test_prompts_that_touch_nothing_are_listed_on_request(run: Run, world: World) -> None:
    few = run("audit", "--prompts", world.prompts, world.host).stdout
    everything = run("audit", "--prompts", world.prompts, world.host, "--all").stdout
    assert "the van" not in few
    for prompt in audited(run, world)["prompts"][3:]:
        membrane = prompt["membranes"][0]
        scores = rf"0\.000 +{membrane['direction']:.3f} +{membrane['thresholds']['direction']['lo']:.3f} +0\.000"
        wanted = rf" +{prompt['line']} +{prompt['prompt']} +allow +no-ghosts +ghost +{scores} *"
        assert any(re.fullmatch(wanted, line) for line in everything.splitlines()), (wanted, everything)


def test_every_row_has_the_action_of_its_own_rule(run: Run, world: World) -> None:
    lines = run("audit", "--prompts", "-", world.host, stdin="a robot, fox, ghost\n").stdout.splitlines()
    assert lines[0].split() == [*TITLES, "trigger", "words"]
    for row in (r"1 +a robot, fox, ghost +erase +no-ghosts +ghost +1", r"refuse +no-robots", r"flag +see-foxes"):
        assert any(re.match(f" +{row}", line) for line in lines), (row, lines)


def test_a_membrane_that_no_word_opened_says_what_the_prompt_is_similar_to(
    run: Run, world: World, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        HEAD + GHOST.replace("severity", "transport: {score: [direction, lexical], lo: -1.0, hi: -0.9}, severity"),
        "utf-8",
    )
    args = ["--model", world.pipeline, "--policy", str(policy), "--membranes", world.membranes]
    found = json.loads(run("audit", "--prompts", "-", args, "--json", stdin="the van\n").stdout)
    membrane = found["prompts"][0]["membranes"][0]
    assert (membrane["action"], membrane["words"], membrane["similar_to"]) == ("erase", [], "ghost")
    shown = run("audit", "--prompts", "-", args, stdin="the van\n").stdout
    assert re.search(r"the van +erase .* similar to 'ghost'", shown)


def test_standard_input_gives_what_the_file_gives(run: Run, world: World) -> None:
    given = run("audit", "--prompts", "-", world.host, "--json", stdin=Path(world.prompts).read_bytes())
    assert json.loads(given.stdout) == audited(run, world)


@pytest.mark.parametrize(
    ("threshold", "code"), [("info", 1), ("high", 1), ("critical", 1), (None, 0)], ids=lambda value: str(value)
)
def test_fail_on(run: Run, world: World, threshold: str | None, code: int) -> None:
    args = ["--fail-on", threshold] if threshold else []
    result = run("audit", "--prompts", world.prompts, world.host, args, "--json")
    assert result.exit_code == code
    assert len(json.loads(result.stdout)["prompts"]) == 5
    assert ("exit 1: a rule of severity critical is touched" in result.stderr) == bool(code)


def test_fail_on_above_what_is_found(run: Run, world: World) -> None:
    result = run("audit", "--prompts", "-", world.host, "--fail-on", "high", stdin="a fox\nthe van\n")
    assert result.exit_code == 0
    assert "1 of 2 prompts touch no rule" in result.stdout


def test_a_long_file_is_one_table_and_one_object(run: Run, world: World, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    count = 2 * audit.BATCH + 3
    prompts = ["a ghost" if k % audit.BATCH == 1 else f"van {k}" for k in range(count)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), "utf-8")
    found = json.loads(run("audit", "--prompts", path, world.host, "--json").stdout)
    assert [row["prompt"] for row in found["prompts"]] == prompts
    assert [row["index"] for row in found["prompts"]] == list(range(count))
    lines = run("audit", "--prompts", path, world.host).stdout.splitlines()
    assert sum("lexical" in line for line in lines) == 1
    touched = [line for line in lines if "a ghost" in line]
    assert [int(line.split()[0]) for line in touched] == [2, audit.BATCH + 2, 2 * audit.BATCH + 2]
    assert len({line.index("a ghost") for line in touched}) == 1


def test_rules_without_a_membrane_are_announced(run: Run, world: World, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(HEAD + "  - {id: no-ogres, concept: ogre, category: ip-character}\n", "utf-8")
    args = ["--model", world.pipeline, "--policy", str(policy)]
    result = run("audit", "--prompts", "-", args, "--json", stdin="an ogre\n")
    assert "warning: tiny: 0 of 1 rules erase" in result.stderr
    found = json.loads(result.stdout)
    assert len(found["notices"]) == 1
    assert (found["prompts"][0]["outcome"], found["prompts"][0]["membranes"]) == ("refuse", [])
