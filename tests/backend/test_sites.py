"""Which modules are sites, and which membranes a denoiser takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from tiny import random_membrane, same_state, state_of, tiny_sd
from torch import nn

from safegen.backend import backend_of
from safegen.backend.injection import Injection
from safegen.backend.sites import file_key, find_sites, plan
from safegen.errors import (
    AlreadyAppliedError,
    BaseModelMismatchError,
    NoMatchingSiteError,
    SafegenError,
    ShapeMismatchError,
    UnsupportedBackendError,
)
from safegen.membrane.weights import Factor


def test_sites_are_every_linear_and_conv_inside_the_transformer_blocks(pipe: Any) -> None:
    found = find_sites(pipe.unet, Transformer2DModel)
    wanted = [
        name
        for name, module in pipe.unet.named_modules()
        if ".attentions." in name and type(module) in (nn.Linear, nn.Conv2d, pipe.unet.conv_in.__class__)
    ]
    assert sorted(found.modules) == sorted(wanted)
    # 4 transformers: proj_in, proj_out, twice q, k, v, out, and two of the feed-forward.
    assert len(wanted) == 4 * 12
    assert all(found.modules[name] is pipe.unet.get_submodule(name) for name in wanted)


class OddLinear(nn.Linear):
    """A subclass, as quantisation and other libraries make them."""


class OddConv(nn.Conv2d):
    """Likewise."""


def test_subclasses_of_linear_and_conv_are_sites() -> None:
    pipe = tiny_sd()
    plain = find_sites(pipe.unet, Transformer2DModel)
    for module in plain.modules.values():
        odd_class: Any = OddLinear if isinstance(module, nn.Linear) else OddConv
        module.__class__ = odd_class
    odd = find_sites(pipe.unet, Transformer2DModel)
    assert list(odd.modules) == list(plain.modules)
    assert odd.architecture == plain.architecture


def test_a_lora_changes_neither_the_sites_nor_the_architecture() -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_sd()
    plain = backend_of(pipe)
    targets = ["to_q", "to_k", "to_out.0", "proj_in", "ff.net.2"]
    pipe.unet.add_adapter(peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    assert any("lora_A" in name for name, _ in pipe.unet.named_modules())
    loaded = backend_of(pipe)
    assert list(loaded.sites.modules) == list(plain.sites.modules)
    assert loaded.sites.architecture == plain.sites.architecture
    assert all(loaded.sites.modules[name] is module for name, module in plain.sites.modules.items())


def test_keys_are_those_of_the_reference_code(pipe: Any) -> None:
    keys = backend_of(pipe).sites.by_key()
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert keys["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"] == name
    assert len(keys) == 48  # no two sites share a key


def test_two_models_of_one_shape_share_an_architecture_and_others_do_not() -> None:
    first = backend_of(tiny_sd(seed=0))
    assert backend_of(tiny_sd(seed=1)).sites.architecture == first.sites.architecture
    assert backend_of(tiny_sd(seed=1)).family == first.family
    assert backend_of(tiny_sd(blocks=(16, 48))).sites.architecture != first.sites.architecture
    assert backend_of(tiny_sd(width=64)).sites.architecture != first.sites.architecture


def test_a_model_without_sites_is_refused() -> None:
    with pytest.raises(NoMatchingSiteError, match="Sequential.*no Linear or Conv2d inside a Transformer2DModel"):
        find_sites(nn.Sequential(nn.Linear(2, 2)), Transformer2DModel)


def test_an_object_without_the_parts_is_refused_with_what_was_found(pipe: Any) -> None:
    class Odd:
        unet = pipe.unet
        tokenizer = pipe.tokenizer

    with pytest.raises(UnsupportedBackendError, match=r"Odd is not a pipeline.*unet: UNet2DConditionModel"):
        backend_of(Odd())


def zero_matches(pipe: Any) -> Any:
    pair = Factor(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    return replace(random_membrane(pipe), architecture="", factors={"lora_unet_mid_block_conv": pair})


def foreign_key(pipe: Any) -> Any:
    membrane = random_membrane(pipe)
    pair = Factor(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    return replace(membrane, factors={**membrane.factors, "lora_unet_down_blocks_9_to_q": pair})


def other_widths(_pipe: Any) -> Any:
    return random_membrane(tiny_sd(blocks=(16, 48)))


def other_widths_unlabelled(_pipe: Any) -> Any:
    return replace(random_membrane(tiny_sd(blocks=(16, 48))), architecture="", base="")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (zero_matches, NoMatchingSiteError, "holds 1 sites, 0 of them are in this model"),
        (foreign_key, NoMatchingSiteError, "holds 49 sites, 48 of them.*lora_unet_down_blocks_9_to_q"),
        (other_widths, BaseModelMismatchError, "was made for base"),
        (other_widths_unlabelled, ShapeMismatchError, "expected down"),
    ],
)
def test_a_membrane_for_another_model_is_refused_without_mutation(
    make: Any, error: type[SafegenError], message: str, pipe: Any
) -> None:
    backend = backend_of(pipe)
    before = state_of(pipe.unet)
    wrong = make(pipe)
    with pytest.raises(error, match=message) as caught:
        # The sound membrane first: it must not be attached when the second is refused.
        Injection(backend.denoiser, backend.sites, [random_membrane(pipe), wrong], backend.family)
    assert type(caught.value) is error
    assert same_state(before, state_of(pipe.unet))


def test_the_message_of_a_mismatch_names_both_bases(pipe: Any) -> None:
    other = other_widths(pipe)
    backend = backend_of(pipe)
    with pytest.raises(BaseModelMismatchError) as caught:
        plan(other, backend.sites, backend.family)
    assert other.base != backend.family
    for part in (repr(other.base), repr(backend.family), other.architecture[:12], backend.sites.architecture[:12]):
        assert part in str(caught.value)


def test_a_membrane_may_cover_some_of_the_sites(pipe: Any) -> None:
    backend = backend_of(pipe)
    whole = random_membrane(pipe)
    some = dict(list(whole.factors.items())[:5])
    injection = Injection(backend.denoiser, backend.sites, [replace(whole, factors=some)], backend.family)
    assert [file_key(name) for name in injection.site_names] == [
        file_key(name) for name in backend.sites.modules if file_key(name) in some
    ]
    assert len(injection.site_names) == 5


def test_a_second_injection_is_refused_when_planned_and_when_attached(pipe: Any) -> None:
    backend = backend_of(pipe)
    clean = state_of(pipe.unet)
    first, late = (
        Injection(backend.denoiser, backend.sites, [random_membrane(pipe)], backend.family) for _ in range(2)
    )
    first.attach(lambda _a, _k: pytest.fail("not called"), lambda _: None)
    held = state_of(pipe.unet)
    with pytest.raises(AlreadyAppliedError, match="already carries a policy"):
        Injection(backend.denoiser, backend.sites, [random_membrane(pipe)], backend.family)
    with pytest.raises(AlreadyAppliedError, match="already carries a policy"):
        late.attach(lambda _a, _k: pytest.fail("not called"), lambda _: None)
    assert same_state(held, state_of(pipe.unet))
    first.detach()
    assert same_state(clean, state_of(pipe.unet))
