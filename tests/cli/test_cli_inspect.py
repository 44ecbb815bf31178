"""`safegen inspect`: what a membrane holds, and norms that are those of the product."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_world import Run, World

from safegen.membrane.file import file_digest, read_membrane, write_membrane
from safegen.membrane.weights import Factor, Membrane


def rewritten(world: World, path: Path, changes: dict[str, float], others: float = 1.0) -> Path:
    """Writes the ghost's membrane with some sites' up factors scaled."""
    membrane = read_membrane(world.ghost)
    factors = {
        key: Factor(f.down, f.up * changes.get(key, others), f.alpha) for key, f in sorted(membrane.factors.items())
    }
    write_membrane(replace(membrane, factors=factors), path)
    return path


def product_norm(factor: Factor) -> float:
    return (factor.scale * factor.up.flatten(1) @ factor.down.flatten(1)).norm().item()


def test_facts_and_norms(run: Run, world: World) -> None:
    found = json.loads(run("inspect", world.ghost, "--json").stdout)
    membrane = read_membrane(world.ghost)
    assert found["concept"] == "ghost"
    assert (found["targets"], found["base"], len(found["calibration"])) == (["ghost"], world.family, 2)
    assert (found["architecture"], found["sha256"]) == (membrane.architecture, file_digest(world.ghost))
    assert (found["parameters"], found["bytes"]) == (membrane.parameter_count(), world.ghost.stat().st_size)
    assert found["site_count"] == len(membrane.factors) == len(found["sites"])
    for site in found["sites"]:
        expected = product_norm(membrane.factors[f"lora_unet_{site['site']}"])
        assert site["norm"] == pytest.approx(expected, rel=1e-5)
    assert [block["block"] for block in found["blocks"]] == [
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    ]
    assert sum(block["sites"] for block in found["blocks"]) == len(found["sites"])
    assert sum(block["share"] for block in found["blocks"]) == pytest.approx(1)
    total = sum(site["norm"] ** 2 for site in found["sites"])
    assert sum(block["norm"] ** 2 for block in found["blocks"]) == pytest.approx(total)
    assert found["warnings"] == []


def test_table_has_the_numbers_of_the_json(run: Run, world: World) -> None:
    found = json.loads(run("inspect", world.ghost, "--json").stdout)
    shown = run("inspect", world.ghost.parent).stdout
    assert re.search(rf"^sha256 +{found['sha256']}$", shown, re.MULTILINE)
    assert re.search(r"^surrogate +-$", shown, re.MULTILINE)
    for block in found["blocks"]:
        pattern = rf"{re.escape(block['block'])} +{block['sites']} +{block['norm']:.4g} +{block['share']:.1%}"
        assert re.search(pattern, shown)
    strongest = max(found["sites"], key=lambda site: site["norm"])
    assert re.search(rf"{strongest['site']} +{strongest['norm']:.4g}", shown)


def test_higher_ranks_convolutions_and_alpha(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    factors = {
        "lora_unet_mid_block_attentions_0_proj_in": Factor(torch.randn(3, 4, 3, 3), torch.randn(5, 3, 1, 1), 1.5),
        "lora_unet_elsewhere": Factor(torch.randn(3, 8), torch.randn(6, 3), 6.0),
    }
    path = tmp_path / "m.safetensors"
    write_membrane(Membrane("x", ("x",), "sd1", "", factors), path)
    found = json.loads(run("inspect", path, "--json").stdout)
    norms = {f"lora_unet_{site['site']}": site["norm"] for site in found["sites"]}
    assert norms == {key: pytest.approx(product_norm(factor), rel=1e-5) for key, factor in factors.items()}
    assert {block["block"] for block in found["blocks"]} == {"mid_block.attentions.0", "other"}


def test_warnings(run: Run, world: World, tmp_path: Path) -> None:
    first, second, *_ = sorted(read_membrane(world.ghost).factors)
    odd = rewritten(world, tmp_path / "odd.safetensors", {first: 0.0, second: 500.0})
    result = run("inspect", odd)
    assert result.exit_code == 0
    assert "warning: 1 of 48 sites change nothing" in result.stderr
    assert f"warning: outlier: {second.removeprefix('lora_unet_')} has norm" in result.stderr
    nothing = rewritten(world, tmp_path / "nothing.safetensors", {}, others=0.0)
    found = json.loads(run("inspect", nothing, "--json").stdout)
    assert found["warnings"] == ["this membrane changes nothing: the product of its factors is 0 at every site"]
    assert all(block["share"] == 0 for block in found["blocks"])
