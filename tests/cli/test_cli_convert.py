"""`safegen convert`: from any LoRA layout to a membrane that policies take, and to a LoRA that diffusers opens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_world import HEAD, Run, World, complaint
from safetensors.torch import load_file, save_file
from tiny import tiny_sd
from torch import Tensor

from safegen.backend import backend_of
from safegen.backend.blank import BLANK_FAMILIES
from safegen.cli.convert import TextEncoder
from safegen.membrane.file import file_digest, read_membrane, write_membrane
from safegen.membrane.formats import TextEncoder as TextEncoderChoice
from safegen.membrane.formats import read_lora
from safegen.membrane.weights import Factor, Membrane


def converted(run: Run, *args: str | Path) -> dict[str, Any]:
    result = run("convert", *args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def same(found: Membrane, wanted: Membrane) -> bool:
    return found.factors.keys() == wanted.factors.keys() and all(
        torch.equal(f.down, wanted.factors[key].down)
        and torch.equal(f.up, wanted.factors[key].up)
        and f.alpha == wanted.factors[key].alpha
        for key, f in found.factors.items()
    )


@pytest.fixture(scope="module")
def lora(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 in half precision that names no concept, as a trainer of diffusers writes it."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(lora_tensors(4), path)
    return path


def lora_tensors(rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, module in backend_of(tiny_sd()).sites.modules.items():
        if name.endswith(("to_q", "to_out.0")):
            height, width = module.weight.shape
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator).half()
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(height, rank, generator=generator).half()
    return tensors


def test_a_membrane_goes_to_peft_and_back(run: Run, world: World, tmp_path: Path) -> None:
    out, back = tmp_path / "lora.safetensors", tmp_path / "deep" / "back.safetensors"
    result = run("convert", world.ghost.parent, out, "--to", "peft", "--base", world.pipeline)
    assert result.exit_code == 0, result.stderr
    assert "warning: opened as a LoRA a membrane is always on: it has no gate, and enforces nothing" in result.stderr
    for name, value in (
        ("layout found", "spm"),
        ("site count", "48"),
        ("ranks found", "1"),
        ("ranks", "1"),
        ("energy kept", "1.0"),
        ("sha256", file_digest(out)),
    ):
        assert re.search(rf"^{name} +{value}$", result.stdout, re.MULTILINE), name
    host = tiny_sd()
    host.load_lora_weights(tmp_path, weight_name=out.name)
    assert sum(hasattr(module, "lora_A") for module in host.unet.modules()) == 48
    found = converted(run, out, back, "--to", "spm")  # its own keys say where the sites are
    assert (found["layout_found"], found["concept"], found["base"]) == ("peft", "ghost", world.family)
    assert back.read_bytes() == world.ghost.read_bytes()


def test_a_lora_becomes_a_membrane_that_a_policy_takes(run: Run, world: World, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "membranes" / world.family / "robot" / "membrane.safetensors"
    args = (lora, out, "--to", "spm", "--rank", "1", "--concept", "robot", "--target", "robot", "--target", "android")
    found = converted(run, *args, "--base", world.pipeline)
    assert (found["layout_found"], found["ranks_found"], found["ranks"]) == ("peft", [4], [1])
    assert 0 < found["energy_kept"] < 1
    assert len(found["energies"]) == found["site_count"] == 16
    membrane = read_membrane(out)
    assert (membrane.concept, membrane.targets, membrane.base) == ("robot", ("robot", "android"), world.family)
    assert membrane.architecture == read_membrane(world.ghost).architecture
    (step,) = json.loads(membrane.metadata["safegen.derived"])
    assert step == {
        "op": "distil",
        "rank": 1,
        "energy_kept": found["energy_kept"],
        "layout": "peft",
        "sha256": file_digest(lora),
    }
    policy = tmp_path / "policy.yaml"
    policy.write_text(HEAD + "  - {id: no-robots, concept: robot, category: ip-character}\n", "utf-8")
    use = ["--model", world.pipeline, "--policy", str(policy), "--membranes", str(tmp_path / "membranes")]
    audited = run("audit", "--prompts", "-", use, "--json", stdin="a robot\n")
    assert audited.exit_code == 0, audited.stderr
    report = json.loads(audited.stdout)
    assert report["prompts"][0]["membranes"][0]["opened"] is True
    shown = json.loads(run("inspect", out, "--json").stdout)
    assert json.loads(shown["derived"]) == [step]


def test_the_number_format_is_the_files_own_unless_asked(run: Run, lora: Path, tmp_path: Path) -> None:
    name = ["--concept", "ghost", "--target", "ghost"]

    def dtypes(*args: str) -> set[torch.dtype]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        converted(run, lora, out, "--to", "peft", *name, *args)
        return {tensor.dtype for tensor in load_file(out).values()}

    assert dtypes() == {torch.float16}
    assert dtypes("--rank", "1") == {torch.float32}
    assert dtypes("--rank", "1", "--dtype", "bfloat16") == {torch.bfloat16}


def test_names_come_from_the_catalogue_where_nobody_gives_them(run: Run, lora: Path, tmp_path: Path) -> None:
    found = converted(run, lora, tmp_path / "a.safetensors", "--to", "spm", "--concept", "van-gogh")
    assert found["targets"][:2] == ["Van Gogh", "Vincent van Gogh"]
    unknown = run("convert", lora, tmp_path / "b.safetensors", "--to", "spm", "--concept", "van-gough")
    assert unknown.exit_code == 2
    assert "Did you mean 'van-gogh'" in complaint(unknown)
    nameless = run("convert", lora, tmp_path / "b.safetensors", "--to", "spm")
    assert nameless.exit_code == 4
    assert "names no concept" in complaint(nameless)
    blank = run("convert", lora, tmp_path / "b.safetensors", "--to", "spm", "--concept", "x", "--target", " ")
    assert blank.exit_code == 2
    assert "blank" in complaint(blank)


def with_text(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    text = {"lora_te_text_model_a.lora_down.weight": torch.ones(1, 2), "lora_te_text_model_a.alpha": torch.tensor(1.0)}
    save_file({**tensors, **text}, path, {"prompts": "ghost"})
    return path


def test_a_text_encoders_factors_are_refused_or_dropped_aloud(run: Run, world: World, tmp_path: Path) -> None:
    kohya = with_text(tmp_path / "kohya.safetensors", load_file(world.ghost))
    out = tmp_path / "m.safetensors"
    refused = run("convert", kohya, out, "--to", "spm")
    assert refused.exit_code == 4
    assert "--text-encoder drop" in complaint(refused)
    assert not out.exists()
    dropped = run("convert", kohya, out, "--to", "spm", "--text-encoder", "drop")
    assert dropped.exit_code == 0
    assert "warning: 2 tensors of the text encoder were left out" in dropped.stderr
    assert same(read_membrane(out), read_membrane(world.ghost))
    shown = run("inspect", kohya)
    assert re.search(r"^layout +spm$", shown.stdout, re.MULTILINE)
    assert "warning: 2 tensors of a text encoder are not shown" in shown.stderr


def test_keys_without_dots_need_the_model_for_peft(run: Run, world: World, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    needs = run("convert", world.ghost, out, "--to", "peft")
    assert needs.exit_code == 2
    assert f"its base model is {world.family}; give" in complaint(needs)
    for base, error, message in (
        ("sd11", 2, "Did you mean 'sd1'"),
        ("sd1", 4, f"made for base '{world.family}', --base is 'sd1'"),
    ):
        wrong = run("convert", world.ghost, out, "--to", "peft", "--base", base)
        assert wrong.exit_code == error
        assert message in complaint(wrong)
    foreign = run("convert", lora, out, "--to", "spm", "--base", "sd1", "--concept", "ghost", "--target", "ghost")
    assert foreign.exit_code == 4
    assert "site" in complaint(foreign)
    assert not out.exists()


@pytest.mark.parametrize("family", BLANK_FAMILIES)
def test_known_families_need_no_model(run: Run, family: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    site = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    factor = Factor(torch.ones(1, 1280), torch.ones(1280, 1), 1.0)
    write_membrane(Membrane("x", ("x",), family, "", {f"lora_unet_{site}": factor}), path)
    converted(run, path, tmp_path / "lora.safetensors", "--to", "peft")
    assert sorted(load_file(tmp_path / "lora.safetensors")) == [
        f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{k}.weight" for k in "AB"
    ]


def test_numbered_files_are_placed_in_their_model(run: Run, world: World, tmp_path: Path) -> None:
    pipe = tiny_sd()
    names = [n for n in backend_of(pipe).sites.modules if ".attn" in n]
    tensors: dict[str, Tensor] = {}
    metadata = {"unet": '["CrossAttention"]'}
    for number, name in enumerate(names):
        height, width = pipe.unet.get_submodule(name).weight.shape
        tensors |= {f"unet:{number}:up": torch.ones(height, 1), f"unet:{number}:down": torch.ones(1, width)}
        metadata[f"unet:{number}:rank"] = "1"
    path, out = tmp_path / "lora.safetensors", tmp_path / "m.safetensors"
    save_file(tensors, path, metadata)
    for command in (["inspect", str(path)], ["convert", str(path), str(out), "--to", "spm", "--concept", "ghost"]):
        without = run(command)
        assert without.exit_code == 4
        assert "--base" in complaint(without)
    named = [path, out, "--to", "spm", "--concept", "ghost", "--target", "ghost", "--base", world.pipeline]
    assert converted(run, *named)["layout_found"] == "cloneofsimo"
    assert len(read_membrane(out).factors) == len(names)
    shown = json.loads(run("inspect", path, "--base", world.pipeline, "--json").stdout)
    assert (shown["layout"], shown["concept"], shown["targets"]) == ("cloneofsimo", "", [])
    assert [site["norm"] for site in shown["sites"]] == [pytest.approx(32.0)] * len(names)


def test_inspect_measures_every_layout_alike(run: Run, world: World, lora: Path, tmp_path: Path) -> None:
    shown = json.loads(run("inspect", lora, "--json").stdout)
    assert (shown["layout"], shown["concept"], shown["site_count"], shown["ranks"]) == ("peft", "", 16, [4])
    membrane = read_lora(lora).membrane(concept="x", targets=["x"])
    for site in shown["sites"]:
        factor = membrane.factors[f"lora_unet_{site['site']}"]
        product = factor.scale * factor.up.double() @ factor.down.double()
        assert site["norm"] == pytest.approx(product.norm().item(), rel=1e-6)
    assert re.search(r"^concept +-$", run("inspect", lora).stdout, re.MULTILINE)
    elsewhere = run("inspect", lora, "--base", "sd2")
    assert elsewhere.exit_code == 4
    assert "site" in complaint(elsewhere)


def test_nothing_is_overwritten(run: Run, world: World, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"mine")
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "nowhere")
    for place, message in ((out, "there already"), (link, "there already"), (tmp_path / "m.bin", ".safetensors")):
        result = run("convert", world.ghost, place, "--to", "spm")
        assert result.exit_code == 2
        assert message in complaint(result)
    below = run("convert", world.ghost, out / "m.safetensors", "--to", "spm")
    assert below.exit_code == 2
    assert "is a file" in complaint(below)
    assert out.read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()


def test_alphas_that_diffusers_would_misread_are_pointed_out(run: Run, world: World, tmp_path: Path) -> None:
    membrane = read_membrane(world.ghost)
    first, *_ = membrane.factors
    factors = {key: replace(f, alpha=2.0 if key == first else f.alpha) for key, f in membrane.factors.items()}
    path = tmp_path / "m.safetensors"
    write_membrane(replace(membrane, factors=factors), path)
    result = run("convert", path, tmp_path / "a.safetensors", "--to", "spm")
    assert "warning: sites differ in alpha" in result.stderr
    assert run("convert", world.ghost, tmp_path / "b.safetensors", "--to", "spm").stderr == ""


def test_the_choices_are_the_librarys() -> None:
    assert {choice.value for choice in TextEncoder} == set(TextEncoderChoice.__args__)
