"""What a guard hands to its log beyond decisions: signatures, seeds, inputs, traces, gaps, redacted text."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from opentelemetry.sdk.trace import TracerProvider
from PIL import Image
from tiny import applied, draw, policy_file, records, tiny_sd

from safegen import apply_policy, verify
from safegen.audit import AuditOptions, HmacKey, Signer
from safegen.errors import UsageError

SIGNER = Signer(bytes(range(32)))


def images_of(pipe: Any, prompts: Any, generator: Any = None, **options: Any) -> Any:
    return pipe(prompts, num_inference_steps=2, generator=generator, output_type="pt", **options).images


def test_a_log_is_signed_with_this_machines_key_or_the_one_given(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key):
        draw(pipe, "a fox")
    own = verify(tmp_path / "audit")
    assert own.ok
    assert own.digests >= 2
    assert len(own.signers) == 1
    assert (tmp_path / "config" / "safegen" / "audit-signing.key").stat().st_mode & 0o777 == 0o600
    with applied(pipe, tmp_path, audit_key, options=AuditOptions(signer=SIGNER)):
        pass
    assert set(verify(tmp_path / "audit").signers) == {*own.signers, SIGNER.public_key}


def test_seeds_are_recorded_with_their_images(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    with applied(pipe, tmp_path, audit_key):
        images_of(pipe, "a fox", seeded(7))
        images_of(pipe, ["a fox", "a cat"], [seeded(2**63), seeded(3)])
        images_of(pipe, ["a fox", "a cat"], seeded(5))
        images_of(pipe, "a fox")
        rebuilt = StableDiffusionPipeline.from_pipe(pipe)  # nothing on it tells what its latents come from
        images_of(rebuilt, "a fox", seeded(9))
    outputs = [record.output for record in records(tmp_path, "generated")]
    assert [(o.seed, o.seeds) for o in outputs if o] == [
        ("7", None),
        (None, (str(2**63),)),
        (None, ("3",)),
        ("5", None),
        ("5", None),
        (None, None),
        (None, None),
    ]


def test_a_seed_that_belongs_to_no_run_is_not_taken_for_another(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key):
        pipe.prepare_latents(1, 4, 32, 32, torch.float32, "cpu", torch.Generator().manual_seed(13))
        images_of(StableDiffusionPipeline.from_pipe(pipe), "a fox")
    (output,) = (record.output for record in records(tmp_path, "generated"))
    assert output is not None
    assert (output.seed, output.seeds) == (None, None)


@pytest.mark.parametrize(
    ("kind", "given", "inputs"),
    [
        (StableDiffusionPipeline, (), ()),
        (StableDiffusionImg2ImgPipeline, ("image",), ("image",)),
        (StableDiffusionInpaintPipeline, ("image", "mask_image"), ("image", "mask")),
    ],
)
def test_inputs_beyond_text_are_recorded(
    kind: Any, given: tuple[str, ...], inputs: tuple[str, ...], tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe = kind(**tiny_sd().components)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pictures = {name: Image.new("L" if name == "mask_image" else "RGB", (size, size), "white") for name in given}
    with applied(pipe, tmp_path, audit_key):
        images_of(pipe, "a fox", strength=1.0, **pictures) if given else images_of(pipe, "a fox")
    assert [record.inputs for record in records(tmp_path, "gated")] == [inputs]


def test_control_residuals_are_recorded(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key):
        states = pipe.encode_prompt("a fox", "cpu", 1, False)[0]
        size = pipe.unet.config.sample_size
        middle = torch.zeros(1)
        pipe.unet(torch.zeros(1, 4, size, size), 1, states, mid_block_additional_residual=middle)
    assert [record.inputs for record in records(tmp_path, "gated")] == [("control", "embeds_only")]


def test_the_hosts_trace_is_named(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key):
        with TracerProvider().get_tracer("host").start_as_current_span("request") as span:
            draw(pipe, "a fox")
        draw(pipe, "a fox")
    first, second = (record.request for record in records(tmp_path, "gated"))
    context = span.get_span_context()
    assert first is not None
    assert second is not None
    assert (first.trace_id, first.span_id) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    assert (second.trace_id, second.span_id) == (None, None)


def test_a_gap_is_recorded_once_writing_works_again(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    guard = applied(pipe, tmp_path, audit_key, mode="observe", audit="{on_failure: degrade}")
    assert not guard.degraded
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # nor does a new segment fit
    try:
        draw(pipe, "a fox")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert guard.degraded
    draw(pipe, "a fox")
    guard.remove()
    found = records(tmp_path)
    (gap,) = (record.gap for record in found if record.kind == "audit.gap")
    assert gap is not None
    assert gap.lost == 2
    assert gap.since < found[-1].ts
    assert [record.kind for record in found] == [
        "segment.open",
        "policy.applied",
        "segment.open",
        "audit.gap",
        "gated",
        "generated",
        "policy.removed",
        "segment.close",
    ]
    report = verify(tmp_path / "audit")
    assert report.ok, str(report)


def test_a_policy_may_ask_for_redacted_text(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    policy = policy_file(tmp_path, {"robot": "refuse"}, audit="{text: redacted}")
    with pytest.raises(UsageError, match="needs a redactor"):
        apply_policy(pipe, policy, audit=tmp_path / "audit", audit_key=audit_key)
    assert "forward" not in pipe.unet.__dict__
    options = AuditOptions(redact=lambda text: text.replace("Zoe", "<name>"))
    with apply_policy(pipe, policy, audit=tmp_path / "audit", audit_key=audit_key, audit_options=options):
        draw(pipe, "Zoe with a fox")
    (gated,) = records(tmp_path, "gated")
    assert gated.prompt is not None
    assert gated.prompt.redacted == "<name> with a fox"
