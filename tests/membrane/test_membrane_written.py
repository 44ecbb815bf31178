"""Written files act in diffusers as their product, say what they are, and lose nothing on the way back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_samples import keyed, lora_layers, merged, same, site_factors
from tiny import draw, random_membrane, tiny_sd

from safegen.backend import backend_of
from safegen.backend.sites import Sites, file_key, plan
from safegen.errors import FormatError
from safegen.membrane.file import file_digest, read_membrane, write_membrane
from safegen.membrane.formats import read_lora, write_peft
from safegen.membrane.weights import Factor, Membrane

SHARED = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def sites(pipe: Any) -> Sites:
    return backend_of(pipe).sites


@pytest.mark.parametrize("to", ["spm", "peft"])
def test_a_written_file_acts_in_stock_diffusers_as_its_product(to: str, sites: Sites, tmp_path: Path) -> None:
    factors = site_factors(sites.modules, 7)
    if to == "spm":  # of alphas that differ, diffusers 0.42 takes one for all sites of a kohya file
        factors = {name: replace(f, alpha=1.5) for name, f in factors.items()}
    membrane = Membrane("ghost", ("ghost",), "tiny", "", keyed(factors))
    path = tmp_path / "lora.safetensors"
    if to == "spm":
        write_membrane(membrane, path)
    else:
        write_peft(membrane, path, {file_key(name): name for name in factors})
    host = tiny_sd()
    plain = draw(host, "a ghost")
    host.load_lora_weights(tmp_path, weight_name=path.name, use_safetensors=True)
    assert lora_layers(host) == len(factors) == 48
    found, wanted = draw(host, "a ghost"), draw(merged(factors), "a ghost")
    assert (plain - wanted).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    scales = {
        name: next(iter(module.scaling.values()))
        for name, module in host.unet.named_modules()
        if hasattr(module, "lora_A")
    }
    assert scales == {name: pytest.approx(f.scale) for name, f in factors.items()}


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
STATED = st.sampled_from(["modelspec.date", "modelspec.license", "modelspec.title", "ss_seed", "safegen.training"])


@st.composite
def membranes(draw: st.DrawFn) -> tuple[Membrane, dict[str, str]]:
    """A membrane with any text in its metadata, and the names of its sites."""
    words = st.from_regex(r"[A-Za-z0-9_]{1,6}(\.[A-Za-z0-9_]{1,6}){0,3}", fullmatch=True)
    names = draw(st.lists(words, min_size=1, max_size=5, unique_by=file_key))
    factors: dict[str, Factor] = {}
    for name in names:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
        r, kernel = draw(st.integers(1, 3)), draw(st.sampled_from([(), (1, 1), (3, 3)]))
        down = torch.randn(r, 3, *kernel, generator=generator).half().float()
        up = torch.randn(4, r, *(1 for _ in kernel), generator=generator).half().float()
        factors[file_key(name)] = Factor(down, up, draw(st.floats(0.0009765625, 1000, width=32)))
    membrane = Membrane(
        concept=draw(TEXT.filter(bool)),
        targets=tuple(draw(st.lists(TEXT.filter(bool), min_size=1, max_size=3))),
        base=draw(st.one_of(TEXT, st.sampled_from(["sd1", "sd2", "mini"]))),
        architecture=draw(TEXT),
        factors=factors,
        surrogate=draw(TEXT),
        metadata=draw(st.dictionaries(STATED, TEXT, max_size=4)),
    )
    return membrane, {file_key(name): name for name in names}


def equal(found: Membrane, wanted: Membrane) -> bool:
    names = ("concept", "targets", "base", "architecture", "surrogate", "metadata")
    return same(found.factors, wanted.factors) and all(getattr(found, n) == getattr(wanted, n) for n in names)


@given(made=membranes())
@SHARED
def test_conversions_there_and_back_lose_nothing(made: tuple[Membrane, dict[str, str]], tmp_path: Path) -> None:
    membrane, names = made
    first, other, last = (tmp_path / f"{k}.safetensors" for k in range(3))
    write_membrane(membrane, first)
    write_peft(read_lora(first).membrane(), other, names)
    reading = read_lora(other)
    assert reading.names == names
    assert equal(reading.membrane(), membrane)
    assert write_membrane(reading.membrane(), last) == file_digest(first)  # the very bytes
    assert equal(read_membrane(last), membrane)


def header(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_files_say_what_they_are_in_the_words_of_modelspec(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    stated = {"modelspec.date": "2026-01-31", "modelspec.license": "CC-BY-4.0"}
    membrane = replace(random_membrane(pipe), base="sd1", metadata=stated)
    for write in (
        lambda: write_membrane(membrane, path),
        lambda: write_peft(membrane, path, plan(membrane, backend_of(pipe).sites, "sd1")),
    ):
        assert write() == write() == file_digest(path)
        found = header(path)
        content = path.read_bytes()
        data = content[8 + int.from_bytes(content[:8], "little") :]
        assert {k: v for k, v in found.items() if k.startswith("modelspec.")} == stated | {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": "safegen membrane: ghost",
            "modelspec.hash_sha256": "0x" + hashlib.sha256(data).hexdigest(),
        }
        assert list(found) == sorted(found)
        assert read_lora(path).membrane().metadata == stated


def test_what_a_file_states_of_itself_wins_over_the_defaults(pipe: Any, tmp_path: Path) -> None:
    stated = {"modelspec.architecture": "stable-diffusion-v2-512/lora", "modelspec.title": "No ghosts"}
    path = tmp_path / "m.safetensors"
    write_membrane(replace(random_membrane(pipe), base="", metadata=stated), path)
    assert header(path).items() >= (stated | {"modelspec.implementation": "diffusers"}).items()
    assert read_membrane(path).metadata == stated
    write_membrane(replace(random_membrane(pipe), base=""), path)
    assert not any(key.startswith("modelspec.") for key in header(path))  # the architecture is not known


def test_altered_data_are_noticed(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_membrane(random_membrane(pipe), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"not those that modelspec\.hash_sha256 states"):
        read_membrane(path)


@pytest.mark.parametrize("key", ["prompts", "modelspec.hash_sha256", "safegen.base", "lora_adapter_metadata"])
def test_metadata_that_the_writer_fills_in_are_not_taken_from_the_caller(key: str, pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"hold {key}, which the writer fills in"):
        write_membrane(replace(random_membrane(pipe), metadata={key: "x"}), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_readers_refuse_is_not_written(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    large = Factor(torch.ones(2049, 1 << 13) / 1e4, torch.ones(1, 2049) / 1e4, 1.0)
    with pytest.raises(FormatError, match="lower the rank"):
        write_membrane(Membrane("x", ("x",), "", "", {"lora_unet_a": large}), path)
    with pytest.raises(FormatError, match=r"bytes of header"):
        write_membrane(replace(random_membrane(pipe), metadata={"note": "x" * (1 << 20)}), path)
    assert not list(tmp_path.iterdir())


def test_peft_needs_the_name_of_every_site(pipe: Any, tmp_path: Path) -> None:
    membrane = random_membrane(pipe)
    names = plan(membrane, backend_of(pipe).sites, "tiny")
    first = next(iter(names))
    wrong = names | {first: names[first].replace(".", "_")}
    write_peft(membrane, tmp_path / "odd.safetensors", wrong)  # a possible name of that key
    for broken in ({k: v for k, v in names.items() if k != first}, names | {first: "elsewhere"}):
        with pytest.raises(FormatError, match=first):
            write_peft(membrane, tmp_path / "m.safetensors", broken)
