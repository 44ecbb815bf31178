"""Static composition under a policy: exact, recorded and removable as runtime is, and refused where it would differ."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import (
    FIXED,
    applied,
    attributes,
    draw,
    draw_embeds,
    install,
    policy_file,
    random_membrane,
    records,
    same_state,
    state_of,
    tiny_sd,
)
from torch import Tensor, nn

from safegen import PromptRefused, apply_policy
from safegen.audit import HmacKey, verify
from safegen.errors import AlreadyAppliedError, AttestationError, UnsupportedBackendError, UsageError
from safegen.guard import Guard

PROMPTS = ["a ghost", "a fox"]


def fixed(pipe: Any, folder: Path, key: HmacKey, composition: Any = "static", **policy: Any) -> Guard:
    policy.setdefault("membranes", [random_membrane(pipe, size=0.1)])
    policy.setdefault("extra", FIXED)
    return applied(pipe, folder, key, composition=composition, **policy)


def images(pipe: Any, **options: Any) -> Tensor:
    return draw(pipe, PROMPTS, guidance_scale=3, **options)


def test_it_draws_what_runtime_draws_and_says_so_and_comes_off_bit_for_bit(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    base, before, own = images(pipe), state_of(pipe.unet, pipe.text_encoder, pipe.vae), attributes(pipe)
    membranes = [random_membrane(pipe, size=0.1), random_membrane(pipe, "fox", size=0.1, seed=1, rank=3)]
    rules = {"ghost": "erase, strength: 1.5", "fox": "erase"}
    found: dict[str, Tensor] = {}
    for composition in ("runtime", "static", "auto"):
        (tmp_path / composition).mkdir()
        guard = fixed(pipe, tmp_path / composition, audit_key, composition, rules=rules, membranes=membranes)
        assert guard.composition == ("runtime" if composition == "runtime" else "static")
        found[composition] = images(pipe, negative_prompt="a photo")
        guard.remove()
        assert same_state(before, state_of(pipe.unet, pipe.text_encoder, pipe.vae))
        assert attributes(pipe) == own
        assert torch.equal(images(pipe), base)
    torch.testing.assert_close(found["static"], found["runtime"], atol=1e-4, rtol=1e-3)
    assert torch.equal(found["auto"], found["static"])
    assert (found["static"] - base).abs().amax(dim=(1, 2, 3)).min() > 0.01
    for kind in ("gated", "generated"):
        for record in records(tmp_path / "static", kind):
            assert record.attest is not None
            assert record.attest.composition == "static"
            assert [(m.permeability, m.opened, m.effect) for m in record.membranes or ()] == [(1.0, True, None)] * 2
    assert {r.attest.composition for r in records(tmp_path / "runtime", "generated") if r.attest} == {"runtime"}
    assert verify(tmp_path / "static" / "audit").ok


@pytest.mark.parametrize(
    ("extra", "rules", "mode", "reason"),
    [
        ("", {"ghost": "erase"}, "enforce", r"rule 'ghost' opens as far as a prompt asks \(score direction, lexical\)"),
        (
            ", transport: {score: always}",
            {"ghost": "erase"},
            "enforce",
            r"rule 'ghost' leaves unconditional rows shut \(guidance conditional\)",
        ),
        (FIXED, {"ghost": "erase", "fox": "erase, transport: {score: lexical}"}, "enforce", "rule 'fox' opens as far"),
        (FIXED, {"ghost": "erase"}, "observe", "policy 'tiny' is in mode observe"),
        (FIXED, {"ghost": "erase"}, "disabled", "policy 'tiny' is in mode disabled"),
    ],
)
def test_what_varies_is_refused_with_the_rule_and_auto_opens_it_per_row(
    extra: str, rules: dict[str, str], mode: str, reason: str, tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe = tiny_sd()
    membranes = [random_membrane(pipe, concept) for concept in rules]
    before = state_of(pipe.unet)
    options: dict[str, Any] = dict(rules=rules, mode=mode, extra=extra, membranes=membranes)
    with pytest.raises(UsageError, match=reason):
        fixed(pipe, tmp_path, audit_key, **options)
    assert same_state(before, state_of(pipe.unet))
    with fixed(pipe, tmp_path, audit_key, "auto", **options) as guard:
        assert guard.composition == "runtime"


def test_least_of_one_is_fixed_too(tmp_path: Path, audit_key: HmacKey) -> None:
    extra = ", transport: {least: 1.0, guidance: both}"
    with fixed(tiny_sd(), tmp_path, audit_key, extra=extra) as guard:
        assert guard.composition == "static"


def test_an_unknown_composition_is_refused(tmp_path: Path, audit_key: HmacKey) -> None:
    with pytest.raises(UsageError, match="expected one of runtime, static, auto, found 'merged'"):
        fixed(tiny_sd(), tmp_path, audit_key, "merged")


def test_rules_that_refuse_still_refuse(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    with fixed(pipe, tmp_path, audit_key, rules={"ghost": "erase", "fox": "refuse"}):
        draw(pipe, "a ghost")
        with pytest.raises(PromptRefused, match="the prompt names 'fox'"):
            draw(pipe, "a fox")


def test_every_row_is_recorded_as_open_whatever_the_conditioning(tmp_path: Path, audit_key: HmacKey) -> None:
    """Merged weights act on all rows; a record that says less would be false."""
    pipe = tiny_sd()
    with fixed(pipe, tmp_path, audit_key):
        draw(pipe, "a fox", negative_prompt="a ghost", guidance_scale=5)
        draw(pipe, "a fox", guidance_scale=1)
        draw_embeds(pipe, torch.randn(2, 16, 32), guidance_scale=1)
    found = [m.permeability for r in records(tmp_path, "generated") for m in r.membranes or ()]
    assert found == [1.0] * 4


def test_it_is_never_merged_twice(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    membrane = random_membrane(pipe, size=0.1)
    with fixed(pipe, tmp_path, audit_key, membranes=[membrane]):
        wanted = images(pipe)
        other: Any = StableDiffusionPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        root, path = install(tmp_path, membrane), policy_file(tmp_path, extra=FIXED)
        for again in (pipe, other):
            with pytest.raises(AlreadyAppliedError, match="already carries a policy"):
                apply_policy(again, path, audit=tmp_path, audit_key=audit_key, membranes=[root], composition="static")
        assert torch.equal(images(pipe), wanted)
    for _ in range(2):  # and each cycle merges into the same weights
        with fixed(pipe, tmp_path, audit_key, membranes=[membrane]):
            assert torch.equal(images(pipe), wanted)


def test_a_pipeline_that_shares_the_denoiser_draws_under_the_policy(tmp_path: Path, audit_key: HmacKey) -> None:
    """Merged weights are not seen by anybody without the gate and the record that go with them."""
    pipe = tiny_sd()
    other: Any = StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    base = images(other)
    guard = fixed(pipe, tmp_path, audit_key)
    assert torch.equal(images(other), images(pipe))
    assert sum(r.output.n for r in records(tmp_path, "generated") if r.output) == 4
    site = other.unet.get_submodule("mid_block.attentions.0.proj_in")
    with pytest.raises(AttestationError, match="outside of the denoiser's guarded forward"):
        site(torch.zeros(1, site.weight.shape[1], 4, 4))
    guard.remove()
    assert torch.equal(images(other), base)


def test_threads_share_merged_weights(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()

    def work(prompt: str) -> Tensor:
        parts: dict[str, Any] = dict(tokenizer=copy.deepcopy(pipe.tokenizer), scheduler=copy.deepcopy(pipe.scheduler))
        own: Any = StableDiffusionPipeline.from_pipe(pipe, **parts)
        own.set_progress_bar_config(disable=True)
        return torch.cat([draw(own, prompt, seed=k) for k in range(3)])

    prompts = ["a ghost", "a fox", "the mouse", "a santa"]
    with fixed(pipe, tmp_path, audit_key), ThreadPoolExecutor(4) as pool:
        wanted = [work(prompt) for prompt in prompts]
        found = list(pool.map(work, prompts))
    assert [p for p, a, b in zip(prompts, wanted, found, strict=True) if not torch.equal(a, b)] == []


def test_a_deep_copy_is_merged_on_its_own_weights_and_comes_free(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    base = images(pipe)
    guard = fixed(pipe, tmp_path, audit_key)
    merged = images(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(images(twin), merged)
    twin.unet.load_state_dict(tiny_sd(seed=1).unet.state_dict())
    assert not torch.allclose(images(twin), merged, atol=0.01)
    assert torch.equal(images(pipe), merged)
    guard.remove()
    assert torch.equal(images(pipe), base)
    other = tiny_sd()
    other.unet.load_state_dict(tiny_sd(seed=1).unet.state_dict())
    assert torch.equal(images(twin), images(other))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_site_below_a_hook_is_refused_and_auto_opens_it_per_row(
    dtype: torch.dtype, tmp_path: Path, audit_key: HmacKey
) -> None:
    """Its weight is another one when it runs."""
    pipe = tiny_sd()
    pipe.unet.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)
    with pytest.raises(UnsupportedBackendError, match="a hook that was installed before the policy"):
        fixed(pipe, tmp_path, audit_key)
    with fixed(pipe, tmp_path, audit_key, "auto") as guard:
        assert guard.composition == "runtime"
        images(pipe)


class Own(nn.Linear):
    """Does more than its weight says, as a quantised layer does."""

    def forward(self, input: Tensor) -> Tensor:
        """Doubles the output."""
        return 2 * super().forward(input)


def test_a_layer_with_a_forward_of_its_own_is_refused(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q = Own(attention.to_q.in_features, attention.to_q.out_features, bias=False)
    with pytest.raises(UnsupportedBackendError, match=r"attn1\.to_q cannot run .*Own's own forward"):
        fixed(pipe, tmp_path, audit_key)


def test_a_membrane_that_the_weights_number_format_would_swallow_is_refused(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    pipe.unet.to(torch.bfloat16)
    before = state_of(pipe.unet)
    weak = [random_membrane(pipe, size=0.004)]
    with pytest.raises(AttestationError, match=r"merged into weights of bfloat16, \d+% of what the membranes change"):
        fixed(pipe, tmp_path, audit_key, membranes=weak)
    assert same_state(before, state_of(pipe.unet))
    pipe.unet.to(torch.float32)
    with fixed(pipe, tmp_path, audit_key, membranes=weak) as guard:
        assert guard.composition == "static"
        images(pipe)
        pipe.unet.to(torch.bfloat16)
        for _ in range(2):
            with pytest.raises(AttestationError, match="merged into weights of bfloat16"):
                images(pipe)


def test_where_merging_fails_auto_opens_membranes_per_row_once(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd().to(torch.bfloat16)
    weak = [random_membrane(pipe, size=0.004)]
    with fixed(pipe, tmp_path, audit_key, "runtime", membranes=weak):
        wanted = images(pipe)
    with fixed(pipe, tmp_path, audit_key, "auto", membranes=weak) as guard:
        assert guard.composition == "runtime"
        assert torch.equal(images(pipe), wanted)


def test_merged_weights_are_not_trained(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    with fixed(pipe, tmp_path, audit_key):
        with pytest.raises(AttestationError, match="merged weights pass no gradient"):
            pipe.unet(x, 500, encoder_hidden_states=states)
        pipe.unet.requires_grad_(False)
        states.requires_grad_()
        pipe.unet(x, 400, encoder_hidden_states=states).sample.sum().backward()
        assert states.grad is not None
        assert states.grad.abs().sum() > 0
