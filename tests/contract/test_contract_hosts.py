"""What hosts do to a pipeline before and after a policy was applied, in every family."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import FOX, NOT_FUSED, PROMPTS, Case, base_images, feature, membrane_for, picture, refusing, shared
from PIL import Image
from tiny import applied, random_membrane, records, rowwise
from torch import Tensor

from safegen.audit import HmacKey
from safegen.backend import backend_of
from safegen.backend.sites import plan
from safegen.cli.host import BaseModel
from safegen.errors import AttestationError, CoverageError
from safegen.guard import Guard
from safegen.membrane.file import read_membrane, write_membrane
from safegen.membrane.formats import write_peft

peft = pytest.importorskip("peft")
accelerate: Any = pytest.importorskip("accelerate")


def guard(case: Case, pipe: Any, folder: Path, key: HmacKey) -> Guard:
    return applied(pipe, folder, key, membranes=[membrane_for(case)])


def lora(case: Case, folder: Path) -> Path:
    """A LoRA in the layout that diffusers loads in every family, on every site."""
    pipe = shared(case)
    backend = backend_of(pipe)
    membrane = random_membrane(pipe, concept="other", seed=5, size=0.1)
    model = BaseModel(backend.family, backend.denoiser, backend.sites)
    path = folder / "lora.safetensors"
    write_peft(membrane, path, model.names(membrane), component=model.component)
    return path


def load(pipe: Any, path: Path) -> None:
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="other")


@feature("LoRA", "a user's LoRA, loaded before or after the policy, leaves the gates as they are")
def test_a_lora_before_and_after(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    path = lora(case, tmp_path)
    pipe = case.build()
    load(pipe, path)
    adapted = sum(hasattr(module, "lora_A") for module in backend_of(pipe).denoiser.modules())
    assert adapted == case.sites  # the file's keys are those that the family's loader knows
    plain = case.draw(pipe, PROMPTS)
    assert not torch.equal(plain[1], base_images(case)[1])
    with guard(case, pipe, tmp_path, audit_key):
        before = case.draw(pipe, PROMPTS)
        assert rowwise(before, plain) == [False, True]
    later = case.build()
    (tmp_path / "later").mkdir()
    with guard(case, later, tmp_path / "later", audit_key):
        load(later, path)
        assert torch.equal(case.draw(later, PROMPTS), before)
        later.unload_lora_weights()
        assert rowwise(case.draw(later, PROMPTS), base_images(case)) == [False, True]


@feature("files", "membranes are read back as written; a pipeline saved under a policy holds the base model")
def test_files(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, membrane = shared(case), membrane_for(case)
    backend = backend_of(pipe)
    write_membrane(membrane, tmp_path / "m.safetensors")
    found = read_membrane(tmp_path / "m.safetensors")
    assert plan(found, backend.sites, backend.family).keys() == membrane.factors.keys()
    assert all(torch.equal(found.factors[key].down, f.down) for key, f in membrane.factors.items())
    plain = {name: value.clone() for name, value in backend.denoiser.state_dict().items()}
    denoiser: Any = backend.denoiser
    with guard(case, pipe, tmp_path, audit_key):
        denoiser.save_pretrained(tmp_path / "denoiser")
    loaded = type(denoiser).from_pretrained(tmp_path / "denoiser").state_dict()
    assert list(loaded) == list(plain)
    assert all(torch.equal(value, loaded[name]) for name, value in plain.items())


@feature("from_pipe", "a pipeline rebuilt on the same parts is guarded as the first one is")
def test_a_rebuilt_pipeline_is_guarded(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, base = shared(case), base_images(case)
    with guard(case, pipe, tmp_path, audit_key):
        assert rowwise(case.draw(case.again(pipe), PROMPTS), base) == [False, True]
    assert {record.verdict.decision for record in records(tmp_path, "gated") if record.verdict} == {"match", "clear"}


def offload(pipe: Any) -> None:
    """What `enable_model_cpu_offload` installs on every part, here with the CPU for a device."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload_with_hook(part, torch.device("cpu"))


@pytest.mark.parametrize("first", ["policy", "host"])
@feature("offload", "hooks that move parts to a device and back leave the gates as they are")
def test_offload(case: Case, first: str, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = case.build()
    if first == "host":
        offload(pipe)
    with guard(case, pipe, tmp_path, audit_key):
        if first == "policy":
            offload(pipe)
        assert rowwise(case.draw(pipe, PROMPTS), base_images(case)) == [False, True]


@feature("callbacks", "step callbacks go on working")
def test_callbacks(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    steps: list[int] = []
    new = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters

    def at_step(*given: Any) -> Any:
        steps.append(given[1] if new else given[0])
        return {}

    options: dict[str, Any] = {"callback_on_step_end" if new else "callback": at_step}
    with guard(case, pipe, tmp_path, audit_key):
        assert torch.equal(case.draw(pipe, [FOX], **options), case.draw(pipe, [FOX]))
    assert steps == [0, 1]


@feature("fused projections", "fusing projections after the policy, which would go round sites, refuses the next image")
def test_fused_projections_are_refused(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = case.build()
    with guard(case, pipe, tmp_path, audit_key):
        denoiser: Any = backend_of(pipe).denoiser
        denoiser.fuse_qkv_projections()
        with pytest.raises((AttestationError, CoverageError)):
            case.draw(pipe, [FOX])
        denoiser.unfuse_qkv_projections()
        assert rowwise(case.draw(pipe, PROMPTS), base_images(case)) == [False, True]
    assert len(records(tmp_path, "run.failed")) == 1


@refusing("fused projections", NOT_FUSED)
def test_projections_that_are_not_fused(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = case.build()
    with guard(case, pipe, tmp_path, audit_key):
        denoiser: Any = backend_of(pipe).denoiser
        with contextlib.suppress(AttributeError):
            denoiser.fuse_qkv_projections()
        assert rowwise(case.draw(pipe, PROMPTS), base_images(case)) == [False, True]


def from_image(case: Case, kind: str, **options: Any) -> Callable[[Any], Tensor]:
    def draw(pipe: Any) -> Tensor:
        other = case.again(pipe, kind)
        found = [
            other(
                prompt=prompt,
                image=picture(),
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
                **(dict(case.options) | {"strength": 0.9} | options),
            ).images
            for prompt in PROMPTS
        ]
        return torch.cat([torch.as_tensor(images) for images in found])

    return draw


def white() -> Image.Image:
    """A mask that has everything drawn anew."""
    return Image.new("L", (16, 16), 255)


@feature("img2img", "text gates hold where an image is drawn from; what it shows is not read")
def test_image_to_image(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    draw = from_image(case, case.further["img2img"])
    pipe = shared(case)
    plain = draw(pipe)
    with guard(case, pipe, tmp_path, audit_key):
        assert rowwise(draw(pipe), plain) == [False, True]


@feature("inpaint", "text gates hold where a part of an image is drawn anew; what the rest shows is not read")
def test_inpainting(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    draw = from_image(case, case.further["inpaint"], mask_image=white())
    pipe = shared(case)
    plain = draw(pipe)
    with guard(case, pipe, tmp_path, audit_key):
        assert rowwise(draw(pipe), plain) == [False, True]
