"""LoRA files of every layout: what is read is what was meant, or the file is refused."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_samples import (
    keyed,
    lora_layers,
    merged,
    numbered,
    old_layer,
    old_processor,
    peft,
    same,
    saved,
    site_factors,
    spm,
)
from peft import LoraConfig, get_peft_model_state_dict
from tiny import draw, tiny_sd
from torch import Tensor, nn

from safegen.backend import backend_of
from safegen.backend.blank import BLANK_FAMILIES, blank_denoiser
from safegen.backend.sites import Sites, file_key, plan
from safegen.errors import FormatError, NoMatchingSiteError, ShapeMismatchError, UnsupportedBackendError
from safegen.membrane.file import read_membrane
from safegen.membrane.formats import read_lora, write_peft
from safegen.membrane.layouts import Layout, detect_layout
from safegen.membrane.order import Host
from safegen.membrane.weights import Factor

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Encoder = Callable[[Mapping[str, Factor]], dict[str, Tensor]]
LAYOUTS: dict[str, tuple[Layout, Encoder]] = {
    "spm": (Layout.SPM, spm),
    "peft": (Layout.PEFT, peft),
    "peft without prefix": (Layout.PEFT, lambda f: peft(f, "")),
    "peft of a transformer": (Layout.PEFT, lambda f: peft(f, "transformer.")),
    "peft folder": (Layout.PEFT, lambda f: peft(f, "base_model.model.")),
    "peft folder of a unet": (Layout.PEFT, lambda f: peft(f, "base_model.model.unet.")),
    "old processor": (Layout.OLD_DIFFUSERS, old_processor),
    "old processor without prefix": (Layout.OLD_DIFFUSERS, lambda f: old_processor(f, "")),
    "old layer": (Layout.OLD_DIFFUSERS, old_layer),
}
SHARED = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def sites(pipe: Any) -> Sites:
    return backend_of(pipe).sites


@pytest.mark.parametrize("name", LAYOUTS)
@given(data=st.data(), seed=st.integers(0, 9999), rank=st.integers(1, 3))
@SHARED
def test_every_layout_reads_back(
    name: str, data: st.DataObject, seed: int, rank: int, sites: Sites, tmp_path: Path
) -> None:
    layout, encode = LAYOUTS[name]
    usable = [n for n in sites.modules if n.endswith(ATTENTION)] if encode is old_processor else list(sites.modules)
    usable = [n for n in usable if "processor" not in name or n.endswith(ATTENTION)]
    chosen = data.draw(st.lists(st.sampled_from(usable), min_size=1, max_size=6, unique=True))
    factors = site_factors({n: sites.modules[n] for n in chosen}, seed, rank)
    found = read_lora(saved(tmp_path / "m.safetensors", encode(factors)))
    assert found.layout is layout
    assert same(found.factors, keyed(factors))
    assert found.names == ({} if layout is Layout.SPM else {file_key(n): n for n in chosen})
    assert found.component == ("transformer" if "transformer" in name else "unet")
    assert found.membrane().concept == "ghost"


@pytest.mark.parametrize("classes", [("CrossAttention",), ("Attention", "GEGLU"), ("Transformer2DModel",)])
@pytest.mark.parametrize("age", ["now", "former"])
@given(seed=st.integers(0, 9999))
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbered_tensors_are_placed_by_the_hosts_walk(
    classes: tuple[str, ...], age: str, seed: int, pipe: Any, sites: Sites, tmp_path: Path
) -> None:
    factors = {name: replace(f, alpha=float(f.rank)) for name, f in site_factors(sites.modules, seed).items()}
    host = copy.deepcopy(pipe.unet)
    if age == "former":
        reregister(host)
    now = [{"CrossAttention": "Attention"}.get(name, name) for name in classes]
    tensors, metadata = numbered(host, factors, *now)
    metadata["unet"] = json.dumps(classes)  # as the file's own age called them
    path = saved(tmp_path / "m.safetensors", tensors, metadata)
    found = read_lora(path, host=Host(pipe.unet, sites.modules))
    assert found.layout is Layout.CLONEOFSIMO
    assert len(found.factors) == len(tensors) // 2 > 0
    assert same(found.factors, {key: keyed(factors)[key] for key in found.factors})
    assert all(file_key(name) == key for key, name in found.names.items())
    assert found.metadata == {"prompts": "ghost"}
    with pytest.raises(FormatError, match="--base"):
        read_lora(path)


def reregister(unet: nn.Module) -> None:
    """Gives every transformer block the order in which diffusers once registered its parts."""
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            old = dict(module._modules)
            for name in ("attn1", "ff", "attn2", *(n for n in old if n not in ("attn1", "ff", "attn2"))):
                module._modules[name] = module._modules.pop(name)


def test_numbers_of_another_model_are_refused(pipe: Any, sites: Sites, tmp_path: Path) -> None:
    factors = {name: replace(f, alpha=float(f.rank)) for name, f in site_factors(sites.modules, 0).items()}
    tensors, metadata = numbered(pipe.unet, factors, "Attention", "GEGLU")
    host = Host(pipe.unet, sites.modules)

    def refusal(kind: type[Exception], changed: dict[str, Tensor], **said: str) -> str:
        path = saved(tmp_path / "m.safetensors", changed, metadata | said)
        with pytest.raises(kind) as caught:
            read_lora(path, host=host)
        return str(caught.value)

    fewer = {key: value for key, value in tensors.items() if not key.startswith("unet:35:")}
    assert "numbers 35 sites" in refusal(NoMatchingSiteError, fewer)
    gap = {key: value for key, value in tensors.items() if not key.startswith("unet:7:")}
    assert "lacks number 7" in refusal(FormatError, gap)
    swap = {"unet:3": "unet:8", "unet:8": "unet:3"}  # an attention's output and a feed-forward's input
    swapped = tensors | {f"{one}:{p}": tensors[f"{two}:{p}"] for one, two in swap.items() for p in ("up", "down")}
    ranks = {f"{one}:rank": metadata[f"{two}:rank"] for one, two in swap.items()}
    assert "number 3 of the file: site down_blocks" in refusal(ShapeMismatchError, swapped, **ranks)
    assert "rank 3" in refusal(FormatError, tensors, **{"unet:0:rank": "3"})
    assert "classes" in refusal(FormatError, tensors, unet="Attention")
    assert "counts 0" in refusal(NoMatchingSiteError, tensors, unet='["ResnetBlock2D"]')
    assert "counts 32" in refusal(NoMatchingSiteError, tensors, unet='["CrossAttention"]')


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_saves_is_read_with_the_scale_that_it_has_there(
    rslora: bool, sites: Sites, tmp_path: Path
) -> None:
    host = tiny_sd()
    host.unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=3,
            target_modules=["to_q", "proj_in", "ff.net.2"],
            rank_pattern={"attn2.to_q": 2},
            alpha_pattern={"proj_in": 5},
            use_rslora=rslora,
            init_lora_weights="gaussian",
        )
    )
    for name, parameter in host.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(3), std=0.1)
    state: dict[str, Any] = get_peft_model_state_dict(host.unet)
    config = host.unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config, safe_serialization=True
    )
    reading = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    membrane = reading.membrane(concept="ghost", targets=["ghost"])
    assert reading.layout is Layout.PEFT
    assert len(membrane.factors) == lora_layers(host) == 16
    names = plan(membrane, sites, "tiny")
    assert names == reading.names
    torch.testing.assert_close(
        draw(merged({names[key]: f for key, f in membrane.factors.items()}), "a ghost"),
        draw(host, "a ghost"),
        atol=2e-5,
        rtol=1e-4,
    )
    again = tmp_path / "again.safetensors"
    write_peft(membrane, again, names)
    assert same(read_lora(again).factors, membrane.factors)


def test_a_folder_of_peft_needs_its_settings(sites: Sites, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(tiny_sd().unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"]))
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    membrane = read_lora(path).membrane(concept="ghost", targets=["ghost"])
    assert {f.scale for f in membrane.factors.values()} == {3.0}
    assert len(plan(membrane, sites, "tiny")) == 8
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        read_lora(path)


def test_what_diffusers_converts_to_kohya_is_read(sites: Sites, tmp_path: Path) -> None:
    factors = {name: replace(f, alpha=float(f.rank)) for name, f in site_factors(sites.modules, 2).items()}
    tensors = convert_state_dict_to_kohya(peft(factors, alphas=False))
    assert tensors["lora_unet_mid_block_attentions_0_proj_in.alpha"].dtype is torch.int64
    assert same(read_lora(saved(tmp_path / "m.safetensors", tensors)).factors, keyed(factors))


def test_kohya_with_a_text_encoder_is_refused_until_the_caller_drops_it(sites: Sites, tmp_path: Path) -> None:
    factors = site_factors(dict(itertools.islice(sites.modules.items(), 4)), 0)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    peft_text = {f"{text}.lora_A.weight": torch.ones(1, 4), f"{text}.lora_B.weight": torch.ones(4, 1)}
    kohya_text = convert_state_dict_to_kohya(dict(peft_text))
    assert all(key.startswith("lora_te1_") for key in kohya_text)
    for own, foreign, count in ((spm(factors), kohya_text, 3), (peft(factors), peft_text, 2)):
        path = saved(tmp_path / "m.safetensors", own | foreign)
        with pytest.raises(FormatError, match=f"^.*{count} of {len(own) + count} tensors belong to a text encoder"):
            read_lora(path)
        found = read_lora(path, text_encoder="drop")
        assert same(found.factors, keyed(factors))
        assert sorted(found.dropped) == sorted(foreign)
    with pytest.raises(FormatError, match="expected lora_unet_<site>"):
        read_membrane(saved(tmp_path / "m.safetensors", spm(factors) | kohya_text))
    with pytest.raises(FormatError, match="all factors belong to a text encoder"):
        read_lora(saved(tmp_path / "t.safetensors", kohya_text), text_encoder="drop")


def test_embeddings_beside_numbered_tensors_are_dropped_with_the_text_encoder(
    pipe: Any, sites: Sites, tmp_path: Path
) -> None:
    factors = {name: replace(f, alpha=float(f.rank)) for name, f in site_factors(sites.modules, 0).items()}
    tensors, metadata = numbered(pipe.unet, factors, "Attention")
    text = {"text_encoder:0:up": torch.ones(4, 1), "text_encoder:0:down": torch.ones(1, 4), "<s1>": torch.ones(8)}
    said = {"<s1>": "<embed>", "text_encoder": '["CLIPAttention"]', "text_encoder:0:rank": "1"}
    path = saved(tmp_path / "m.safetensors", tensors | text, metadata | said)
    host = Host(pipe.unet, sites.modules)
    with pytest.raises(FormatError, match="3 of 67 tensors"):
        read_lora(path, host=host)
    found = read_lora(path, text_encoder="drop", host=host)
    assert len(found.factors) == 32
    assert sorted(found.dropped) == sorted(text)
    assert found.metadata == {"prompts": "ghost"}


def test_layouts_are_told_by_their_keys(sites: Sites) -> None:
    factors = site_factors(dict(itertools.islice(sites.modules.items(), 2)), 0)
    assert detect_layout(spm(factors)) is Layout.SPM
    assert detect_layout(peft(factors)) is Layout.PEFT
    assert detect_layout(old_layer(factors)) is Layout.OLD_DIFFUSERS
    assert detect_layout(["unet:0:up", "unet:0:down"]) is Layout.CLONEOFSIMO
    with pytest.raises(FormatError, match="mixed layouts: tensor 'lora_unet_"):
        detect_layout([*spm(factors), *peft(factors)])
    with pytest.raises(FormatError, match="mixed prefixes"):
        detect_layout([*peft(factors), *peft(factors, "")])
    with pytest.raises(FormatError, match="'conv_in'"):
        detect_layout([*spm(factors), "conv_in", "conv_out"])
    with pytest.raises(FormatError, match="no factors"):
        detect_layout(["unet.a.alpha"])


@pytest.mark.parametrize("family", BLANK_FAMILIES)
def test_blank_families_have_sites_and_no_values(family: str) -> None:
    denoiser, found = blank_denoiser(family)
    # SDXL has 70 blocks of 10 sites in 11 transformers, as kohya's trainers count them.
    assert len(found.modules) == (70 * 10 + 11 * 2 if family == "sdxl" else 16 * 12)
    assert {p.device.type for p in denoiser.parameters()} == {"meta"}
    widths = {m.weight.shape[1] for n, m in found.modules.items() if n.endswith("attn2.to_k")}
    assert widths == {{"sd1": 768, "sd2": 1024, "sdxl": 2048}[family]}
    assert isinstance(found.modules["mid_block.attentions.0.proj_in"], nn.Conv2d if family == "sd1" else nn.Linear)


def test_an_unknown_family_is_named_with_those_that_are_known() -> None:
    with pytest.raises(UnsupportedBackendError, match="Did you mean 'sd2'"):
        blank_denoiser("sd22")


def test_the_reference_codes_file_places_on_sd1() -> None:
    """Sites of SD v1.4's U-Net by the reference code's class walk are those of the family: 192 keys, all known."""
    _, found = blank_denoiser("sd1")

    def keys() -> Iterator[str]:
        for block, count in (("down_blocks_0", 2), ("down_blocks_1", 2), ("down_blocks_2", 2), ("mid_block", 1)):
            yield from (f"{block}_attentions_{k}" for k in range(count))
        yield from (f"up_blocks_{b}_attentions_{k}" for b in (1, 2, 3) for k in range(3))

    inside = ("proj_in", "proj_out", "ff_net_0_proj", "ff_net_2")
    attention = [f"attn{n}_{p}" for n in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out_0")]
    parts = [p if p.startswith("proj") else f"transformer_blocks_0_{p}" for p in (*inside, *attention)]
    assert {f"lora_unet_{block}_{part}" for block in keys() for part in parts} == set(found.by_key())
