"""What cannot be survived is refused with a reason, before an image is drawn; nothing is drawn with a membrane off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import FIXED, applied, draw, random_membrane, records, skipped, tiny_sd
from torch import nn

from safegen.audit import HmacKey
from safegen.backend import backend_of
from safegen.errors import AttestationError, BaseModelMismatchError, CoverageError, SafegenError

SITE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
Break = Callable[[Any], object]


def fused_projections(pipe: Any) -> None:
    pipe.fuse_qkv_projections()


def replaced_site(pipe: Any) -> None:
    parent = pipe.unet.get_submodule(SITE.rpartition(".")[0])
    old = parent.to_q
    parent.to_q = nn.Linear(old.in_features, old.out_features, bias=False)
    parent.to_q.load_state_dict(old.state_dict())


def removed_attachment(pipe: Any) -> None:
    del pipe.unet.get_submodule(SITE).__dict__["forward"]


def overwritten_attachment(pipe: Any) -> None:
    module = pipe.unet.get_submodule(SITE)
    module.forward = type(module).forward.__get__(module)


def removed_root(pipe: Any) -> None:
    del pipe.unet.__dict__["forward"]


def overwritten_root(pipe: Any) -> None:
    pipe.unet.forward = type(pipe.unet).forward.__get__(pipe.unet)


def all_attachments_removed(pipe: Any) -> None:
    for module in pipe.unet.modules():
        module.__dict__.pop("forward", None)


def replaced_block(pipe: Any) -> None:
    pipe.unet.mid_block = tiny_sd().unet.mid_block


def skipped_block(pipe: Any) -> None:
    pipe.unet.mid_block.forward = skipped


def removed_text_seam(pipe: Any) -> None:
    del pipe.text_encoder.__dict__["forward"]


def quantised(pipe: Any) -> None:
    quantisation: Any = torch.ao.quantization
    with pytest.warns():  # torch is about to drop it, hosts still call it
        quantisation.quantize_dynamic(pipe.unet, {nn.Linear}, inplace=True)


BROKEN_ON_EVERY_PIPELINE: dict[Break, str] = {
    fused_projections: "planned sites did not run",
    replaced_site: f"site {SITE} no longer carries",
    removed_attachment: f"site {SITE} no longer carries",
    overwritten_attachment: f"site {SITE} no longer carries",
    removed_root: "root attachment on UNet2DConditionModel is gone",
    overwritten_root: "root attachment on UNet2DConditionModel is gone",
    all_attachments_removed: "root attachment on UNet2DConditionModel is gone",
    replaced_block: "site mid_block.* no longer carries",
    skipped_block: "planned sites did not run",
    quantised: "no longer carries",
}
BROKEN_ON_THIS_PIPELINE: dict[Break, str] = {
    removed_text_seam: "text encoder no longer reports",
    lambda pipe: setattr(pipe, "unet", tiny_sd().unet): r"pipe\.unet was replaced",
    lambda pipe: pipe.register_modules(unet=tiny_sd().unet): r"pipe\.unet was replaced",
    lambda pipe: setattr(pipe, "text_encoder", tiny_sd().text_encoder): r"pipe\.text_encoder was replaced",
    lambda pipe: setattr(pipe, "tokenizer", tiny_sd().tokenizer): r"pipe\.tokenizer was replaced",
    lambda pipe: setattr(pipe, "vae", tiny_sd().vae): r"pipe\.vae was replaced",
}


def refused(pipe: Any, reason: str) -> None:
    images: list[Any] = []
    for prompt in ("a fox", "a ghost"):
        with pytest.raises((AttestationError, CoverageError), match=reason):
            images.append(draw(pipe, prompt))
    assert images == []


@pytest.mark.parametrize(("break_it", "reason"), (BROKEN_ON_EVERY_PIPELINE | BROKEN_ON_THIS_PIPELINE).items())
def test_the_next_image_is_refused(break_it: Break, reason: str, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    applied(pipe, tmp_path, audit_key)
    draw(pipe, "a fox")
    break_it(pipe)
    refused(pipe, reason)
    failed = records(tmp_path, "run.failed")
    assert len(failed) == 2
    assert len(records(tmp_path, "generated")) == 1


@pytest.mark.parametrize(("break_it", "reason"), BROKEN_ON_EVERY_PIPELINE.items())
def test_so_it_is_with_merged_weights(break_it: Break, reason: str, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    applied(pipe, tmp_path, audit_key, extra=FIXED, composition="static")
    draw(pipe, "a fox")
    break_it(pipe)
    refused(pipe, reason)


@pytest.mark.parametrize(("break_it", "reason"), BROKEN_ON_EVERY_PIPELINE.items())
def test_so_is_that_of_a_pipeline_on_the_same_parts(
    break_it: Break, reason: str, tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe = tiny_sd()
    applied(pipe, tmp_path, audit_key)
    other: Any = StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    draw(other, "a fox")
    break_it(pipe)
    refused(other, reason)
    assert len(records(tmp_path, "run.failed")) == 2


@pytest.mark.parametrize("made_with", ["from_pipe", "its own"])
@pytest.mark.parametrize("break_it", [removed_root, overwritten_root])
def test_a_policy_without_membranes_does_not_go_silently_either(
    break_it: Break, made_with: str, tmp_path: Path, audit_key: HmacKey
) -> None:
    """No site can notice then; whoever encodes a prompt does."""
    pipe = tiny_sd()
    applied(pipe, tmp_path, audit_key, {"robot": "refuse"}, membranes=[])
    other: Any = StableDiffusionPipeline.from_pipe(pipe) if made_with == "from_pipe" else pipe
    draw(other, "a fox")
    break_it(pipe)
    refused(other, "root attachment on UNet2DConditionModel is gone")


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (removed_attachment, "no longer carries"),
        (removed_root, "outside of the denoiser's guarded forward"),
        (skipped_block, "did not run"),
    ],
)
def test_a_run_in_progress_is_stopped(break_it: Break, reason: str, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    applied(pipe, tmp_path, audit_key)
    done: list[int] = []

    def callback(_pipe: Any, step: int, _t: Any, _values: dict[str, Any]) -> dict[str, Any]:
        done.append(step)
        if step == 1:
            break_it(pipe)
        return {}

    if break_it is removed_attachment:
        reason = "did not run"
    with pytest.raises(SafegenError, match=reason):
        draw(pipe, "a ghost", steps=5, callback_on_step_end=callback)
    assert done == [0, 1]


def test_projections_fused_before_the_policy_make_another_architecture(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    pipe.fuse_qkv_projections()
    # Families that safegen knows by name keep their name; a nameless one gets another, and finds no membrane at all.
    membrane = replace(random_membrane(tiny_sd(), floor=1.0), base=backend_of(pipe).family)
    with pytest.raises(BaseModelMismatchError):
        applied(pipe, tmp_path, audit_key, membranes=[membrane])


def test_unfusing_the_projections_brings_the_policy_back(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    applied(pipe, tmp_path, audit_key)
    wanted = draw(pipe, "a ghost")
    pipe.fuse_qkv_projections()
    refused(pipe, "did not run")
    pipe.unfuse_qkv_projections()
    assert torch.equal(draw(pipe, "a ghost"), wanted)


@pytest.mark.parametrize("break_it", [replaced_site, removed_attachment, removed_root])
def test_a_guard_whose_attachments_were_tampered_with_says_so_when_it_is_removed(
    break_it: Break, tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe = tiny_sd()
    guard = applied(pipe, tmp_path, audit_key)
    break_it(pipe)
    with pytest.raises(AttestationError):
        guard.remove()
    assert not guard.removed


def accelerate_hook(module: Any) -> Callable[[], None]:
    hooks: Any = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())
    return lambda: hooks.remove_hook_from_module(module)


def diffusers_hook(module: Any) -> Callable[[], None]:
    from diffusers.hooks import HookRegistry, ModelHook

    HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "other")
    return lambda: module._diffusers_hook.remove_hook("other")


def two_hooks(module: Any) -> Callable[[], None]:
    inner, outer = diffusers_hook(module), accelerate_hook(module)

    def undo() -> None:
        outer()
        inner()

    return undo


@pytest.mark.parametrize("hook", [accelerate_hook, diffusers_hook, two_hooks])
def test_hooks_installed_later_stay_and_run_what_they_would_without_the_policy(
    hook: Callable[[Any], Callable[[], None]], tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe = tiny_sd()
    base = draw(pipe, "a ghost")
    guard = applied(pipe, tmp_path, audit_key)
    hooked = [pipe.unet.get_submodule(SITE), pipe.unet, pipe.text_encoder]
    remove = [hook(module) for module in hooked]
    assert not torch.equal(draw(pipe, "a ghost"), base)  # in force below the hooks
    guard.remove()
    assert torch.equal(draw(pipe, "a ghost"), base)
    for undo in remove:
        undo()
    assert torch.equal(draw(pipe, "a ghost"), base)
    method = type(pipe.text_encoder).forward
    assert all(getattr(module.forward, "__func__", None) in (type(module).forward, method) for module in hooked)


def test_somebody_elses_stand_ins_are_left_alone_and_call_nothing_of_ours(tmp_path: Path, audit_key: HmacKey) -> None:
    """On the text encoder, the autoencoder and the pipeline only observers sit; another patch may wrap them."""
    pipe = tiny_sd()
    base = draw(pipe, "a ghost")
    guard = applied(pipe, tmp_path, audit_key)
    decode, encode, forward = pipe.vae.decode, pipe.encode_prompt, pipe.text_encoder.forward
    pipe.vae.decode, pipe.encode_prompt = partial(decode), partial(encode)
    pipe.text_encoder.forward = partial(forward)
    theirs = (pipe.vae.decode, pipe.encode_prompt, pipe.text_encoder.forward)
    guard.remove()
    assert (pipe.vae.decode, pipe.encode_prompt, pipe.text_encoder.forward) == theirs
    assert torch.equal(draw(pipe, "a ghost"), base)
