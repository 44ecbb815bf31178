"""`safegen generate`: images under a policy, and none where it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from cli_world import FOX, GHOST, HEAD, ROBOT, Run, World, complaint
from PIL import Image

from safegen.audit import read_records


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_images_and_what_is_said_about_them(run: Run, world: World, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    args = ["a ghost", "the van", *world.host, "--steps", "2", "--seed", "7", "--out", str(out), "--audit", str(log)]
    result = run("generate", args, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["seed"] == 7
    assert [(i["file"], i["prompt"], i["seed"], i["decision"]["outcome"]) for i in found["images"]] == [
        (str(out / "0001.png"), "a ghost", 7, "erase"),
        (str(out / "0002.png"), "the van", 8, "allow"),
    ]
    assert sorted(path.name for path in out.iterdir()) == ["0001.png", "0002.png"]
    recorded = [r.output.sha256[0] for r in read_records(log) if r.kind == "generated" and r.output]
    assert recorded == [hashlib.sha256(pixels(out / name)).hexdigest() for name in ("0001.png", "0002.png")]


def test_same_seed_same_images_and_nothing_is_overwritten(run: Run, world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["the van", "a mouse", *world.host, "--steps", "2", "--out", str(out)]
    for seed in ("3", "3", "4"):
        assert run("generate", args, "--seed", seed).exit_code == 0
    assert len(list(out.iterdir())) == 6
    images = [pixels(out / f"{k:04}.png") for k in range(1, 7)]
    assert images[0:2] == images[2:4]
    assert images[4] != images[0]


def test_settings_reach_the_pipeline(run: Run, world: World, tmp_path: Path) -> None:
    args = ["the van", *world.host, "--seed", "1", "--out", str(tmp_path)]
    variants = (
        ["--steps", "2"],
        ["--steps", "3"],
        ["--steps", "2", "--guidance", "2"],
        ["--steps", "2", "--negative", "a mouse"],
    )
    for extra in variants:
        assert run("generate", args, extra).exit_code == 0
    assert len({pixels(path) for path in tmp_path.glob("*.png")}) == len(variants)


def test_table(run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("generate", "a ghost", world.host, "--steps", "1", "--seed", "5", "--out", "out")
    line = result.stdout.splitlines()[-1]
    assert line.split() == ["out/0001.png", "a", "ghost", "erase", "no-ghosts", "1.000", "ghost"]
    assert "seed 5; audit log: " in result.stderr


@pytest.mark.parametrize("command", ["generate", "audit"])
def test_membranes_that_no_rule_uses_are_named(run: Run, world: World, tmp_path: Path, command: str) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(HEAD + FOX, "utf-8")
    own = ["generate", "the van", "--steps", "1", "--out", str(tmp_path / "out")]
    if command == "audit":
        own = ["audit", "--prompts", world.prompts]
    args = ["--model", world.pipeline, "--policy", str(policy), "--membranes", world.membranes]
    (tmp_path / "empty").mkdir()
    result = run(own, args, "--membranes", tmp_path / "empty")
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stderr.split())
    assert f"warning: {world.membranes}: no rule of policy tiny erases ghost, so nothing opens" in said
    assert "add a rule with `concept: ghost`" in said
    assert f"warning: {tmp_path / 'empty'}: no membrane for this model in it" in said
    assert "warning" not in run(own, world.host).stderr


def test_a_refused_prompt_stops_all_and_is_recorded(run: Run, world: World, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    prompts = [*("the van",) * 9, "a robot"]  # in the second batch
    args = [*prompts, *world.host, "--steps", "1", "--out", str(out), "--audit", str(log)]
    result = run("generate", args)
    assert result.exit_code == 1
    assert "refused by rule 'no-robots': the prompt names 'robot'" in complaint(result)
    assert result.stdout == ""
    assert not out.exists()
    kinds = [record.kind for record in read_records(log)]
    assert kinds == ["segment.open", "policy.applied", "refused", "policy.removed", "segment.close"]
    found = json.loads(run("generate", args, "--json").stdout)
    assert (found["images"], found["refused"]["rule"]) == ([], "no-robots")


def test_observing_refuses_nothing(run: Run, world: World, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(HEAD.replace("rules:", "mode: observe\nrules:") + GHOST + ROBOT + FOX, "utf-8")
    args = ["--model", world.pipeline, "--policy", str(policy), "--membranes", world.membranes]
    result = run("generate", "a robot", args, "--steps", "1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "0001.png").is_file()
    assert "warning: tiny: mode is observe" in result.stderr
