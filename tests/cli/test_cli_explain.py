"""`safegen explain` and `safegen calibrate`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_world import Run, World, complaint

from safegen.cli.train_plan import calibration_prompts
from safegen.membrane.file import read_membrane
from safegen.transport.calibration import parse

PROMPT = "a GH0ST and a fox in the style of van " + "the " * 20


def explained(run: Run, world: World, prompt: str = PROMPT) -> dict[str, Any]:
    result = run("explain", "--prompt", prompt, world.host, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_json_has_every_part(run: Run, world: World) -> None:
    found = explained(run, world)
    assert (found["policy"]["id"], found["outcome"], found["rule"]) == ("tiny", "erase", "no-ghosts")
    assert found["model"]["encoder"].startswith("sha256:")
    (ghost,) = found["membranes"]
    assert (ghost["concept"], ghost["verdict"], ghost["permeability"], ghost["strength"]) == (
        "ghost",
        "opens",
        1.0,
        1.0,
    )
    for score in ("direction", "clipcos", "token", "lexical"):
        assert isinstance(ghost[score], float)
    assert ghost["thresholds"] == {"direction": {"lo": 0.99, "hi": 1.0}}
    phrase = ghost["triggers"][0]
    assert (phrase["start"], phrase["end"], phrase["text"]) == (2, 7, "GH0ST")
    assert phrase["normalised"] == ["case", "digits"]
    read = [token for token in found["tokens"] if token["read"]]
    assert len(ghost["evidence"]) == len(read) == 14
    assert found["truncated_tokens"] == len(found["tokens"]) - 14 > 0
    weights = {word["text"]: word["weight"] for word in found["words"]}
    assert weights["GH0ST"] == 1


def test_the_view_says_what_the_json_says(run: Run, world: World) -> None:
    found = explained(run, world)
    shown = run("explain", "--prompt", PROMPT, world.host).stdout
    assert shown.splitlines()[0] == PROMPT
    text = " ".join(shown.split())
    (ghost,) = found["membranes"]
    assert f"direction {ghost['direction']:.3f} 0.990 1.000 1.000 opens erased" in text
    assert "'GH0ST' at 2-7 (lexical, case, digits)" in text
    assert f"{found['truncated_tokens']} tokens are past the model's window" in text
    assert "rule see-foxes: the prompt names fox (fox)" in text


def test_a_shut_membrane_is_explained_too(run: Run, world: World) -> None:
    found = explained(run, world, "the van")
    (ghost,) = found["membranes"]
    assert (found["outcome"], ghost["verdict"], ghost["triggers"]) == ("allow", "shut", [])


def test_a_blank_prompt(run: Run, world: World) -> None:
    result = run("explain", "--prompt", "  ", world.host)
    assert result.exit_code == 2
    assert "--prompt is blank" in complaint(result)


@pytest.fixture
def ghost(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.ghost.parent, tmp_path / "ghost"))


def test_calibrating_writes_the_file_and_says_so(run: Run, world: World, ghost: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a fox\nthe van\nghosts\na photo of a mouse\n", "utf-8")
    path = next(ghost.glob("*.safetensors"))
    old = {one.score: one for one in parse(read_membrane(path).metadata)}
    args = ["calibrate", str(ghost), "--model", world.pipeline, "--captions", str(captions)]
    result = run(args, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert (found["concept"], found["file"]) == ("ghost", str(path))
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    measured = {one.score: one for one in parse(read_membrane(path).metadata)}
    assert {c["score"]: c["lo"] for c in found["calibration"]} == {name: one.lo for name, one in measured.items()}
    assert measured.keys() == old.keys()
    assert measured["direction"].negatives > 100
    assert measured["direction"] != old["direction"]
    table = run(args).stdout
    assert f"{measured['direction'].lo:.4f}" in table
    shown = run("inspect", ghost).stdout
    assert f"lo {measured['direction'].lo}" in shown


def test_calibrating_a_membrane_of_another_base_is_refused(run: Run, ghost: Path) -> None:
    before = next(ghost.glob("*.safetensors")).read_bytes()
    result = run("calibrate", ghost)
    assert result.exit_code == 4
    assert "mini" in complaint(result)
    assert next(ghost.glob("*.safetensors")).read_bytes() == before


def test_prompts_to_calibrate_on_use_what_a_concept_is_called() -> None:
    positives, negatives, _ = calibration_prompts("mickey-mouse", ("Mickey Mouse",), None, "some/model")
    assert "a photo of Mickey Mouse" in positives
    assert "a photo of micky mouse" in positives
    assert any("Donald Duck" in text for text in negatives)
    artist = calibration_prompts("van-gogh", ("Van Gogh",), None, "some/model")
    assert "a painting by Van Gogh" in artist.positives
    unknown, others, near = calibration_prompts("my-brand", ("My Brand",), None, "some/model")
    assert "a photo of My Brand" in unknown
    assert others
    assert not near
    nudity = calibration_prompts("nudity", ("nudity",), None, "some/model")
    assert any("nude lipstick" in text for text in nudity.neighbours)
    mini, _, alike = calibration_prompts("ghost", ("ghost", "phantom"), None, "mini")
    assert "an emoji of a phantom" in mini
    assert "a skull" in alike
