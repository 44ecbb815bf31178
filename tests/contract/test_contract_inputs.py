"""What denoisers read beside prompts, in every family; and what is no family at all."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import CASES, PROMPTS, REFERENCE, Case, every, feature, membrane_for, picture, refusing, shared
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from tiny import applied, records, rowwise
from torch import nn

from safegen.audit import HmacKey
from safegen.backend import backend_of
from safegen.errors import UnsupportedBackendError
from safegen.guard import Guard


def guard(case: Case, pipe: Any, folder: Path, key: HmacKey) -> Guard:
    return applied(pipe, folder, key, membranes=[membrane_for(case)])


def of_unet(pipe: Any) -> Any:
    return ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4))


def of_sd3(pipe: Any) -> Any:
    return SD3ControlNetModel.from_transformer(pipe.transformer, num_layers=1, num_extra_conditioning_channels=0)


def of_flux(pipe: Any) -> Any:
    sizes: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
    return FluxControlNetModel.from_transformer(pipe.transformer, num_layers=1, num_single_layers=1, **sizes)


_CONTROLNETS = {
    "sd1": (of_unet, StableDiffusionControlNetPipeline),
    "sd2": (of_unet, StableDiffusionControlNetPipeline),
    "sdxl": (of_unet, StableDiffusionXLControlNetPipeline),
    "sdxl-lcm": (of_unet, StableDiffusionXLControlNetPipeline),
    "sd3": (of_sd3, StableDiffusion3ControlNetPipeline),
    "flux1": (of_flux, FluxControlNetPipeline),
}


def controlled(case: Case, pipe: Any) -> Any:
    """A pipeline on the same parts with a ControlNet that was made from its denoiser."""
    make, kind = _CONTROLNETS[case.name]
    torch.manual_seed(0)
    net = make(pipe)
    for parameter in net.parameters():  # its last layers are 0 at first
        nn.init.normal_(parameter, std=0.05)
    other: Any = kind(**pipe.components, controlnet=net.eval())
    other.set_progress_bar_config(disable=True)
    return other


@feature("ControlNet", "a ControlNet's residuals are read by no gate: every membrane opens fully (`on_unknown: open`)")
def test_a_controlnet_opens_everything(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    other = controlled(case, pipe)
    name = "control_image" if hasattr(pipe, "transformer") or "Img2Img" in type(other).__name__ else "image"
    given: dict[str, Any] = {name: [picture(), picture()]}
    plain = case.draw(other, PROMPTS, **given)
    with guard(case, pipe, tmp_path, audit_key):
        assert rowwise(case.draw(other, PROMPTS, **given), plain) == [False, False]
    assert all(record.inputs == ("control", "embeds_only") for record in records(tmp_path, "gated"))


@refusing("img2img", REFERENCE)
def test_a_reference_image_opens_everything(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    plain = case.draw(pipe, PROMPTS, image=picture(64))
    with guard(case, pipe, tmp_path, audit_key):
        assert rowwise(case.draw(pipe, PROMPTS, image=picture(64)), plain) == [False, False]


@every
def test_what_comes_beside_the_prompts_is_foreign(case: Case) -> None:
    """Every argument by which a denoiser takes a ControlNet, an adapter or an IP-Adapter's image is known as such."""
    pipe = shared(case)
    backend = backend_of(pipe)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    base = backend.denoiser.forward

    def seen(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return base(*args, **kwargs)

    backend.denoiser.__dict__["forward"] = seen
    try:
        case.draw(pipe, PROMPTS, steps=2)
    finally:
        del backend.denoiser.__dict__["forward"]
    args, kwargs = calls[0]
    assert not backend.call(args, kwargs).foreign
    parameters = set(inspect.signature(type(backend.denoiser).forward).parameters) - {"controlnet_blocks_repeat"}
    known = ("siglip_feats", "kv_cache", "encoder_hidden_states_image")
    more = [n for n in parameters if "controlnet" in n or "additional_residual" in n or n in known]
    for name in more:
        assert backend.call(args, kwargs | {name: [torch.zeros(1)]}).foreign, name
    for holder in ("added_cond_kwargs", "joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"):
        if holder in parameters:
            held = dict(kwargs.get(holder) or {}) | {"ip_adapter_image_embeds": 1, "image_embeds": 1}
            assert backend.call(args, kwargs | {holder: held}).foreign, holder


@every
def test_a_call_without_conditioning_is_refused(case: Case) -> None:
    backend = backend_of(shared(case))
    with pytest.raises(UnsupportedBackendError, match="does not let a step pass unread"):
        backend.call((), {"hidden_states": torch.zeros(1), "timestep": torch.tensor(1)})


class Drawer:
    """Draws somehow."""


def test_an_object_of_no_family_is_refused_with_what_was_looked_for() -> None:
    with pytest.raises(UnsupportedBackendError) as found:
        backend_of(Drawer())
    text = str(found.value)
    for name in (
        "Drawer",
        "UNet2DConditionModel",
        "FluxTransformer2DModel",
        "WanTransformer3DModel",
        "none of these parts",
    ):
        assert name in text


def test_a_pipeline_with_two_denoisers_is_refused() -> None:
    from contract_more import wan

    pipe = wan()
    pipe.register_modules(transformer_2=pipe.transformer)
    with pytest.raises(UnsupportedBackendError, match="two denoisers"):
        backend_of(pipe)


LONG = " ".join(["a fox in the style of a photo of a robot and"] * 2) + " a ghost"  # CLIP's window here is 16 tokens


@pytest.mark.parametrize("rebuilt", [False, True])
def test_what_t5_alone_reads_past_clips_window_opens(rebuilt: bool, tmp_path: Path, audit_key: HmacKey) -> None:
    (case,) = [case for case in CASES if case.name == "flux1"]
    pipe = shared(case)
    long: dict[str, Any] = {"max_sequence_length": 48}
    plain = case.draw(pipe, [LONG], **long)
    with guard(case, pipe, tmp_path, audit_key):
        assert not torch.equal(case.draw(case.again(pipe) if rebuilt else pipe, [LONG], **long), plain)
    (record,) = records(tmp_path, "gated")
    assert [hit.concept for hit in record.hits or ()] == ["ghost"]


def test_an_encoder_that_is_left_out_hides_nothing(tmp_path: Path, audit_key: HmacKey) -> None:
    """CLIP's pooled vector is 0, and T5's states say the rest."""
    (case,) = [case for case in CASES if case.name == "flux1"]
    pipe = shared(case)
    x = torch.randn(2, 4, 8, 8)
    t = torch.full((2,), 500.0)
    with guard(case, pipe, tmp_path, audit_key), torch.no_grad():
        states = backend_of(pipe).condition(PROMPTS)
        states[:, -1] = 0
        found = backend_of(pipe).predict(x, t, states)
    assert rowwise(found, backend_of(pipe).predict(x, t, states)) == [False, True]
