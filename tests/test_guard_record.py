"""What a guard writes into the audit log, when, and what happens where it cannot."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import applied, draw, draw_embeds, random_membrane, records, skipped, tiny_sd

from safegen import Guard, PromptRefused, verify
from safegen.audit import HmacKey, MembraneRecord, Record
from safegen.errors import AttestationError, AuditWriteError, CoverageError

CANARY = "zanzibar"


def pil(pipe: Any, prompts: list[str], **options: Any) -> list[Any]:
    count = len(prompts) * int(options.get("num_images_per_prompt", 1))
    generators = [torch.Generator().manual_seed(k) for k in range(count)]
    return pipe(prompts, num_inference_steps=3, generator=generators, **options).images


def prompt_of(record: Record) -> str | None:
    return record.prompt.hmac if record.prompt else None


def membranes_of(record: Record) -> list[MembraneRecord]:
    return list(record.membranes or ())


def test_digests_are_those_of_the_returned_images(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    prompts = ["a ghost", "a fox"]
    with applied(pipe, tmp_path, audit_key):
        images = pil(pipe, prompts, num_images_per_prompt=2)
        alone = pil(pipe, ["a fox"], guidance_scale=1)
    assert images[0].mode == "RGB"
    found = {prompt_of(r): r.output.sha256 for r in records(tmp_path, "generated")[:2] if r.output}
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    assert len(set(digests)) == 4
    assert found == {
        audit_key.hmac("a ghost"): tuple(digests[:2]),
        audit_key.hmac("a fox"): tuple(digests[2:]),
    }
    last = records(tmp_path, "generated")[-1].output
    assert last is not None
    assert last.sha256 == (hashlib.sha256(alone[0].tobytes()).hexdigest(),)


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_digests_do_not_depend_on_the_form_of_the_output(
    kind: str, pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    with applied(pipe, tmp_path, audit_key):
        (image,) = pil(pipe, ["a fox"])
        pil(pipe, ["a fox"], output_type=kind)
    first, second = (r.output for r in records(tmp_path, "generated"))
    assert first is not None
    assert first == second
    assert first.sha256 == (hashlib.sha256(image.tobytes()).hexdigest(),)


def test_every_prompt_is_gated_before_anything_is_drawn(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    seen: list[list[str]] = []

    def look(_module: Any, _args: Any) -> None:
        seen.append([r.kind for r in records(tmp_path)][2:])

    with applied(pipe, tmp_path, audit_key):
        handle = pipe.unet.conv_in.register_forward_pre_hook(look)
        draw(pipe, ["a ghost", "a fox"])
        handle.remove()
    assert seen == [["gated", "gated"]] * 3
    found = records(tmp_path)
    assert [r.kind for r in found] == [
        "segment.open",
        "policy.applied",
        "gated",
        "gated",
        "generated",
        "generated",
        "policy.removed",
        "segment.close",
    ]
    assert len({r.request.id for r in found if r.request}) == 1
    assert [prompt_of(r) for r in found[2:6]] == [audit_key.hmac(t) for t in ("a ghost", "a fox")] * 2
    assert verify(tmp_path / "audit").ok


def test_what_stands_in_the_records(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    membrane = random_membrane(pipe, floor=1.0)
    rules = {"ghost": "erase, strength: 0.5", "fox": "flag"}
    with applied(pipe, tmp_path, audit_key, rules, membranes=[membrane]) as guard:
        draw(pipe, "ghost and fox", steps=10)
    (policy,), (gated,), (generated,) = (records(tmp_path, k) for k in ("policy.applied", "gated", "generated"))
    file = next((tmp_path / "membranes").rglob("*.safetensors"))
    for record in (policy, gated, generated):
        assert record.policy is not None
        assert (record.policy.id, record.policy.mode) == ("tiny", "enforce")
        assert record.policy.digest == f"sha256:{guard.policy.digest}"
        assert record.attest is not None
        assert (record.attest.modules_expected, record.attest.modules_seen) == (48, 48)
        (found,) = membranes_of(record)
        assert (found.rule, found.concept, found.strength) == ("ghost", "ghost", 0.5)
        assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert record.runtime is not None
        assert record.runtime.torch == torch.__version__
    (found,) = membranes_of(gated)
    assert (found.permeability, found.opened, found.effect) == (1.0, True, None)
    assert found.score is not None
    assert (found.score.token, found.score.lexical) == (None, 1.0)
    assert -1 <= (found.score.direction or 0.0) < 1
    assert [(t.start, t.end, t.by, t.weight) for t in found.triggers or ()] == [(0, 5, "lexical", 1.0)]
    assert [(t.score, t.lo, t.hi) for t in found.thresholds or ()] == [("direction", 1.0, 1.0)]
    assert gated.truncated_tokens == 0
    assert gated.verdict is not None
    assert (gated.verdict.decision, gated.verdict.rule, gated.verdict.severity) == ("match", "ghost", "high")
    assert gated.action is not None
    assert (gated.action.type, gated.action.enforced) == ("erase", True)
    assert [(h.rule, h.text) for h in gated.hits or ()] == [("ghost", None), ("fox", None)]
    (found,) = membranes_of(generated)
    assert found.effect is not None
    assert found.effect > 0
    assert generated.attest is not None
    assert generated.attest.calls == 10
    assert (generated.timing_ms or 0) > 0


def test_the_effect_grows_with_the_strength_and_is_absent_where_nothing_opens(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    effects: list[float] = []
    for name, strength in (("weak", 0.1), ("strong", 0.4)):
        (tmp_path / name).mkdir()
        membrane = random_membrane(pipe, floor=1.0, size=0.1)
        rules = {"ghost": f"erase, strength: {strength}"}
        with applied(pipe, tmp_path / name, audit_key, rules, membranes=[membrane]):
            draw(pipe, ["a ghost", "a fox"])
        ghost, fox = records(tmp_path / name, "generated")
        assert [m.effect for m in fox.membranes or ()] == [None]
        effects += [m.effect or 0.0 for m in ghost.membranes or ()]
    assert effects[1] == pytest.approx(4 * effects[0], rel=0.1)  # exact at the first step


# The text of prompts


def attempts(pipe: Any, guard: Guard) -> None:
    """Everything that could carry a prompt's text into the log."""
    draw(pipe, f"a ghost {CANARY}", negative_prompt=f"{CANARY} fox")
    for prompt in (f"robot {CANARY}", f"{CANARY} r0bot"):
        with pytest.raises(PromptRefused):
            draw(pipe, prompt)
    guard.decide([f"ghost {CANARY}"])
    module = pipe.unet.mid_block.attentions[0].proj_in
    held = module.__dict__.pop("forward")
    with pytest.raises(AttestationError):
        draw(pipe, f"a fox {CANARY}")
    module.__dict__["forward"] = held


def raw(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "audit").rglob("*") if path.is_file())


@pytest.mark.parametrize("text", ["none", "full"])
def test_prompts_are_written_only_where_the_policy_says_so(
    text: str, pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    rules = {"ghost": "erase", "robot": "refuse"}
    with applied(pipe, tmp_path, audit_key, rules, audit=f"{{text: {text}}}") as guard:
        attempts(pipe, guard)
    assert [r.kind for r in records(tmp_path)][2:-2] == ["gated", "generated", "refused", "refused", "run.failed"]
    content = raw(tmp_path)
    assert ("zanz" in content) == (CANARY in content) == (text == "full")
    gated = records(tmp_path, "gated")[0]
    assert prompt_of(gated) == audit_key.hmac(f"a ghost {CANARY}")
    assert gated.negative is not None
    assert gated.negative.hmac == audit_key.hmac(f"{CANARY} fox")


def test_texts_that_are_one_to_the_tokenizer_are_recorded_as_written(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    texts = ["A  GHOST", "a ghost"]
    with applied(pipe, tmp_path, audit_key):
        for text in texts:
            draw(pipe, text)
    assert [prompt_of(r) for r in records(tmp_path, "gated")] == [audit_key.hmac(text) for text in texts]


# Runs that fail


def test_a_stopped_run_is_recorded_under_its_own_request(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    with applied(pipe, tmp_path, audit_key):
        draw(pipe, "a fox")
        block.attn2.forward = skipped
        with pytest.raises(CoverageError):
            draw(pipe, "the fox")
        del block.attn2.__dict__["forward"]
        held = block.attn2.to_q.__dict__.pop("forward")
        with pytest.raises(AttestationError):  # nothing is encoded, so it is the denoiser that notices
            draw_embeds(StableDiffusionPipeline.from_pipe(pipe), torch.ones(1, 16, 32))
        with pytest.raises(AttestationError):
            draw(pipe, "a fox")
        block.attn2.to_q.__dict__["forward"] = held
        draw(pipe, "a fox")
    found = [(r.kind, r.request.id) for r in records(tmp_path) if r.request]
    assert [kind for kind, _ in found] == [
        "gated",
        "generated",
        "gated",
        "run.failed",
        "run.failed",
        "run.failed",
        "gated",
        "generated",
    ]
    ids = [request for _, request in found]
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]
    assert ids[6] == ids[7]
    assert len(set(ids)) == 5
    codes = [r.error.code for r in records(tmp_path, "run.failed") if r.error]
    assert codes == ["CoverageError", "AttestationError", "AttestationError"]


def test_a_membrane_that_is_open_and_does_nothing_stops_the_run(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    """Factors so small that their products are zero in the model's numbers."""
    with (
        applied(pipe, tmp_path, audit_key, membranes=[random_membrane(pipe, size=1e-30)]),
        pytest.raises(AttestationError, match="measured effect is 0"),
    ):
        draw(pipe, "a ghost")
    assert [r.kind for r in records(tmp_path)][2:-2] == ["gated", "run.failed"]


# Records that cannot be written


@contextmanager
def full_disk(guard: Guard) -> Generator[None]:
    """Lets no file grow beyond the log's present size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (guard.audit_path.stat().st_size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def steps_of(pipe: Any) -> list[int]:
    """Counts the steps that begin from now on."""
    steps: list[int] = []

    def count(_module: Any, _args: Any) -> None:
        steps.append(1)

    pipe.unet.conv_in.register_forward_pre_hook(count)
    return steps


@pytest.mark.parametrize("mode", ["enforce", "observe"])
def test_what_cannot_be_recorded_is_not_drawn(mode: str, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    guard = applied(pipe, tmp_path, audit_key, mode=mode)
    steps = steps_of(pipe)
    with full_disk(guard), pytest.raises(AuditWriteError):
        draw(pipe, "a fox")
    assert steps == []
    with pytest.raises(AuditWriteError):  # nor afterwards: the log has a hole
        draw(pipe, "a fox")
    assert steps == []
    with pytest.raises(AuditWriteError):
        guard.remove()
    assert guard.removed
    assert "forward" not in pipe.unet.__dict__


def test_an_image_whose_record_cannot_be_written_is_not_returned(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    guard = applied(pipe, tmp_path, audit_key)
    disk = full_disk(guard)

    def fill(_pipe: Any, step: int, _t: Any, _values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            disk.__enter__()
        return {}

    try:
        with pytest.raises(AuditWriteError):
            draw(pipe, "a fox", callback_on_step_end=fill)
    finally:
        disk.__exit__(None, None, None)
    assert [r.kind for r in records(tmp_path)] == ["segment.open", "policy.applied", "gated"]


def test_a_closed_log_stops_the_next_run(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    guard = applied(pipe, tmp_path, audit_key)
    steps = steps_of(pipe)
    guard._log.close()
    with pytest.raises(AuditWriteError, match="closed"):
        draw(pipe, "a fox")
    assert steps == []


def test_observe_may_go_on_without_its_record(
    tmp_path: Path, audit_key: HmacKey, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny_sd()
    base = draw(pipe, "a ghost")
    guard = applied(pipe, tmp_path, audit_key, mode="observe", audit="{text: none, on_failure: degrade}")
    assert not guard._recorder.degraded
    with full_disk(guard):
        assert torch.equal(draw(pipe, "a ghost"), base)
    assert guard._recorder.degraded
    assert "a record was lost" in caplog.text


def test_a_log_that_cannot_take_the_first_record_leaves_the_pipeline_alone(
    tmp_path: Path, audit_key: HmacKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safegen.guard as module

    pipe = tiny_sd()
    opened = module.AuditLog.open

    def closed(*args: Any, **kwargs: Any) -> Any:
        log = opened(*args, **kwargs)
        log.close()
        return log

    monkeypatch.setattr(module.AuditLog, "open", closed)
    with pytest.raises(AuditWriteError):
        applied(pipe, tmp_path, audit_key)
    assert not any("forward" in m.__dict__ for m in (*pipe.unet.modules(), *pipe.text_encoder.modules()))
    assert "decode" not in pipe.vae.__dict__
    assert "encode_prompt" not in pipe.__dict__


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_writes_its_own_segment(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key) as guard:
        draw(pipe, "a fox")
        child = os.fork()
        if child == 0:
            try:
                draw(pipe, "a ghost")
                guard._log.close()
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        draw(pipe, "a fox")
    report = verify(tmp_path / "audit")
    assert report.ok
    assert report.segments == 2
    assert [prompt_of(r) for r in records(tmp_path, "gated")].count(audit_key.hmac("a ghost")) == 1
