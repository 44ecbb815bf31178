"""Bad input of every kind: one clear message, the exit code of its kind, and nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import GHOST, HEAD, Run, World, complaint
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from tiny import random_membrane, tiny_sd

from safegen.audit.files import segment_files
from safegen.cli.drawing import save_picture
from safegen.cli.options import check_folder
from safegen.errors import UsageError
from safegen.membrane.file import write_membrane

Arguments = Callable[[World, Path], list[str]]


def with_policy(text: str) -> Arguments:
    def build(world: World, folder: Path) -> list[str]:
        policy = folder / "policy.yaml"
        policy.write_text(text, "utf-8")
        return ["--model", world.pipeline, "--policy", str(policy)]

    return build


def with_membrane_of_another_base(world: World, folder: Path) -> list[str]:
    other = random_membrane(tiny_sd(blocks=(16, 48)), "ghost")
    write_membrane(other, folder / "membranes" / world.family / "ghost" / "membrane.safetensors")
    return ["--model", world.pipeline, "--policy", world.policy, "--membranes", str(folder / "membranes")]


def with_damaged_membrane(world: World, folder: Path) -> list[str]:
    shutil.copytree(world.membranes, folder / "membranes")
    path = folder / "membranes" / world.family / "ghost" / "membrane.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["--model", world.pipeline, "--policy", world.policy, "--membranes", str(folder / "membranes")]


def with_pipeline_of_another_kind(world: World, folder: Path) -> list[str]:
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "ddpm")
    return ["--model", str(folder / "ddpm"), "--policy", world.policy]


def with_folder_that_is_no_pipeline(world: World, folder: Path) -> list[str]:
    return ["--model", str(folder), "--policy", world.policy]


def with_unknown_hub_id(world: World, folder: Path) -> list[str]:
    return ["--model", "nobody/nothing", "--policy", world.policy]


def without_membranes_folder(world: World, folder: Path) -> list[str]:
    return ["--model", world.pipeline, "--policy", world.policy, "--membranes", str(folder / "none")]


def without_policy(world: World, folder: Path) -> list[str]:
    return ["--model", world.pipeline, "--policy", "strct"]


HOST_FAULTS: dict[str, tuple[Arguments, int, list[str]]] = {
    "no such policy": (without_policy, 3, ["strct: neither a file nor a shipped policy", "Did you mean 'strict'?"]),
    "malformed policy": (with_policy("rules: [\n"), 3, ["policy.yaml:"]),
    "two faults in a policy": (
        with_policy(HEAD.replace("1.0.0", "one") + GHOST.replace("severity: high", "severity: hihg")),
        3,
        ["2 faults in the policy:", "policy.yaml:3:", "policy.yaml:5:", "Did you mean 'high'?"],
    ),
    "unknown concept": (
        with_policy(HEAD + GHOST.replace("concept: ghost", "concept: gost")),
        3,
        ["1 fault in the policy:", "policy.yaml:5:", "unknown concept 'gost'. Did you mean 'ghost'?"],
    ),
    "membrane of another base": (
        with_membrane_of_another_base,
        4,
        ["membrane 'ghost' was made for base 'sd-", "this model is 'sd-"],
    ),
    "damaged membrane": (with_damaged_membrane, 4, ["membrane.safetensors: damaged safetensors file"]),
    "no folder of membranes": (without_membranes_folder, 4, ["none: no such folder"]),
    "pipeline of another kind": (
        with_pipeline_of_another_kind,
        4,
        ["DDPMPipeline is not a pipeline that safegen can guard", "Found: unet: UNet2DModel"],
    ),
    "no pipeline": (with_folder_that_is_no_pipeline, 2, ["not a pipeline folder", "model_index.json"]),
    "unknown hub id": (with_unknown_hub_id, 2, ["nobody/nothing: no pipeline could be loaded"]),
}


@pytest.mark.parametrize("kind", HOST_FAULTS)
@pytest.mark.parametrize("command", ["audit", "audit --json", "generate", "generate --json"])
def test_bad_host_policy_or_membrane(run: Run, world: World, tmp_path: Path, command: str, kind: str) -> None:
    build, code, expected = HOST_FAULTS[kind]
    args = build(world, tmp_path)
    out, log = tmp_path / "out", tmp_path / "log"
    name, *flags = command.split()
    own = ["--prompts", world.prompts] if name == "audit" else ["a ghost", "--out", str(out), "--audit", str(log)]
    result = run(name, own, args, flags)
    message = complaint(result)
    assert result.exit_code == code, message
    assert all(part in message for part in expected), message
    assert result.stdout == ""
    assert not out.exists()
    assert not log.exists()


PROMPT_FAULTS: dict[str, tuple[bytes | None, list[str]]] = {
    "missing": (None, ["expected a prompts file, found nothing there"]),
    "empty": (b"", ["expected at least one prompt, found none"]),
    "blank": (b"\n \n", ["expected at least one prompt, found none"]),
    "not UTF-8": (b"a ghost\na caf\xe9\n", [":2: expected UTF-8, found byte 0xe9"]),
    "1 MB line": (b"a ghost\n" + b"x" * 1_000_000 + b"\n", [":2: expected at most 65536 bytes"]),
}


@pytest.mark.parametrize("kind", PROMPT_FAULTS)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_bad_prompts_file(run: Run, world: World, tmp_path: Path, kind: str, flags: list[str]) -> None:
    content, expected = PROMPT_FAULTS[kind]
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    result = run("audit", "--prompts", path, world.host, flags)
    assert result.exit_code == 2
    assert all(part in complaint(result) for part in expected)
    assert result.stdout == ""


def test_bad_prompts_on_standard_input(run: Run, world: World) -> None:
    result = run("audit", "--prompts", "-", world.host, "--json", stdin=b"a ghost\n\xff\n")
    assert result.exit_code == 2
    assert "standard input:2: expected UTF-8" in complaint(result)
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["generate", "train"])
def test_output_folder_that_is_a_file(run: Run, world: World, tmp_path: Path, command: str) -> None:
    (tmp_path / "out").write_text("mine", "utf-8")
    own = ["a ghost", *world.host] if command == "generate" else ["--concept", "ghost", "--model", world.pipeline]
    result = run(command, own, "--out", tmp_path / "out" / "deeper")
    assert result.exit_code == 2
    assert "out is a file" in complaint(result)
    assert (tmp_path / "out").read_text("utf-8") == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs the proc file system")
@pytest.mark.parametrize("command", ["generate", "demo"])
def test_output_folder_that_cannot_be_written(run: Run, world: World, tmp_path: Path, command: str) -> None:
    log = tmp_path / "log"
    own = ["a ghost", *world.host, "--audit", str(log)] if command == "generate" else []
    result = run(command, own, "--out", "/proc/x/y")
    assert result.exit_code == 2
    message = complaint(result)
    assert message.startswith("error: /proc/x/y: expected an output folder that can be written to: ")
    assert "choose another place" in message
    assert "loading" not in result.stderr
    assert not log.exists()


def test_looking_for_an_output_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    (tmp_path / "there").mkdir()
    check_folder(tmp_path / "there")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 50)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # every file ends at 1,000 bytes
    try:
        with pytest.raises(UsageError, match=r"0001\.png: could not be written: .*; make room or choose another place"):
            save_picture(noise, tmp_path / "0001.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_blank_prompt(run: Run, world: World, tmp_path: Path) -> None:
    result = run("generate", "a ghost", " ", world.host, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "prompt 2 is blank" in complaint(result)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def log(run: Run, world: World, tmp_path: Path) -> Path:
    """The folder of a log that `generate` wrote."""
    folder = tmp_path / "log"
    drawn = run("generate", "a ghost", world.host, "--steps", "1", "--out", tmp_path / "out", "--audit", folder)
    assert drawn.exit_code == 0, drawn.stderr
    return folder


def test_log_that_verifies(run: Run, log: Path) -> None:
    result = run("audit", "verify", log)
    assert result.exit_code == 0
    assert result.stderr.startswith("any key was accepted")
    assert result.stdout.startswith("3/3 digests valid, 1/1 segments valid, ")
    public = json.loads(run("audit", "key", "--json").stdout)["public_key"]
    pinned = run("audit", "verify", log, "--pubkey", public)
    assert (pinned.exit_code, pinned.stderr, pinned.stdout) == (0, "", result.stdout)
    other = run("audit", "verify", log, "--pubkey", "00" * 32)
    assert other.exit_code == 4
    assert "none of the keys" in complaint(other)
    assert "expected 64 hex digits" in complaint(run("audit", "verify", log, "--pubkey", "mine"))
    assert json.loads(run("audit", "verify", log, "--json").stdout)["ok"] is True


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_log_that_was_tampered_with(run: Run, log: Path, flags: list[str]) -> None:
    (segment,) = segment_files(log)
    segment.write_text(segment.read_text("utf-8").replace('"type":"erase"', '"type":"allow"'), "utf-8")
    result = run("audit", "verify", log, flags)
    assert result.exit_code == 4
    assert "not as it was written" in complaint(result)
    assert f"{segment.name}:3: seq 2: hash does not match the record" in complaint(result)
    if flags:
        report = json.loads(result.stdout)
        assert (report["ok"], report["fault_count"], report["faults"][0]["seq"]) == (False, 1, 2)
    else:
        assert "fault: " in result.stdout


def test_log_that_is_not_there(run: Run, tmp_path: Path) -> None:
    result = run("audit", "verify", tmp_path / "none")
    assert result.exit_code == 2
    assert "found nothing there" in complaint(result)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_inspecting_what_is_no_membrane(run: Run, world: World, tmp_path: Path, flags: list[str]) -> None:
    damaged = tmp_path / "membrane.safetensors"
    damaged.write_bytes(world.ghost.read_bytes()[:-100])
    for path, expected in ((damaged, "damaged safetensors file"), (tmp_path / "none", "no such membrane file")):
        result = run("inspect", path, flags)
        assert result.exit_code == 4
        assert expected in complaint(result)
        assert result.stdout == ""


TRAIN_FAULTS: dict[str, tuple[list[str], list[str]]] = {
    "unknown concept of mini": (["--concept", "gost"], ["draws nothing of that name", "Did you mean 'ghost'?"]),
    "unknown concept": (
        ["--concept", "van-gohg", "--model", "."],
        ["the concept catalogue has none of that id", "Did you mean 'van-gogh'?"],
    ),
    "values out of bounds": (
        ["--concept", "ghost", "--rank", "0", "--eta", "-1", "--learning-rate", "0"],
        ["--rank 0: ", "--eta -1.0: ", "--learning-rate 0.0: "],
    ),
    "blank name": (["--concept", "ghost", "--target", " "], ["a name to erase is blank"]),
    "missing pool": (["--concept", "ghost", "--pool", "none.txt"], ["none.txt: expected a prompts file"]),
}


@pytest.mark.parametrize("kind", TRAIN_FAULTS)
def test_training_that_cannot_start(run: Run, tmp_path: Path, kind: str) -> None:
    args, expected = TRAIN_FAULTS[kind]
    result = run("train", args, "--out", tmp_path / "out")
    message = complaint(result)
    assert result.exit_code == 2
    assert all(part in message for part in expected), message
    assert not (tmp_path / "out").exists()
