"""Conditioning that changes during a run, and where one run ends and the next begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import applied, draw, embeds, records, rowwise
from torch import Tensor

from safegen import PromptRefused
from safegen.audit import HmacKey

pytestmark = pytest.mark.usefixtures("untouched")


def swap(new: Tensor, at: int) -> Any:
    def callback(_pipe: Any, step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            values["prompt_embeds"] = torch.cat([values["prompt_embeds"][:1], new])
        return values

    return dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_conditioning_swapped_in_a_callback_is_gated_and_recorded_again(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    base = draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "a ghost"), 1))
    with applied(pipe, tmp_path, audit_key):
        found = draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "a ghost"), 1))
        kept = draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "the robot"), 1))
    assert not torch.equal(found, base)
    assert torch.equal(kept, draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "the robot"), 1)))
    gated = [(r.prompt and r.prompt.hmac, r.action and r.action.type) for r in records(tmp_path, "gated")]
    fox, ghost, robot = (audit_key.hmac(text) for text in ("a fox", "a ghost", "the robot"))
    assert gated == [(fox, "allow"), (ghost, "erase"), (fox, "allow"), (robot, "allow")]
    ids = [r.request and r.request.id for r in records(tmp_path, "gated")]
    assert (ids[0] == ids[1], ids[2] == ids[3], ids[0] == ids[2]) == (True, True, False)
    erased, _ = records(tmp_path, "generated")
    assert [m.effect is not None and m.effect > 0 for m in erased.membranes or ()] == [True]


def test_conditioning_swapped_for_what_is_refused_stops_the_run(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key, {"robot": "refuse"}, membranes=[]), pytest.raises(PromptRefused):
        draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "a robot"), 1))
    assert [r.kind for r in records(tmp_path)][2:-2] == ["gated", "refused"]


@pytest.mark.parametrize("inference", [False, True])
def test_conditioning_written_in_place_is_gated_again(
    inference: bool, pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    new = embeds(pipe, "a ghost")

    def callback(_pipe: Any, step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            values["prompt_embeds"][1:] = new
        return {}

    options: dict[str, Any] = dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with applied(pipe, tmp_path, audit_key), torch.inference_mode(inference):
        new = embeds(pipe, "a ghost")
        draw(pipe, "a fox", steps=4, **options)
    assert [r.action and r.action.type for r in records(tmp_path, "gated")] == ["allow", "erase"]


def test_conditioning_that_is_copied_at_every_step_is_recorded_once(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    def callback(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": values["prompt_embeds"].clone()}

    with applied(pipe, tmp_path, audit_key):
        draw(
            pipe, "a fox", steps=4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        )
    assert len(records(tmp_path, "gated")) == 1


def test_asking_for_a_decision_in_the_middle_of_a_run_changes_nothing(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    with applied(pipe, tmp_path, audit_key) as guard:
        wanted = draw(pipe, "a fox", negative_prompt="a ghost")

        def callback(_pipe: Any, _step: int, _t: Any, _values: dict[str, Any]) -> dict[str, Any]:
            assert guard.decide(["a ghost"])[0].outcome == "erase"
            return {}

        assert torch.equal(draw(pipe, "a fox", negative_prompt="a ghost", callback_on_step_end=callback), wanted)
    assert len(records(tmp_path, "gated")) == 2


def test_inference_mode(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, ["a ghost", "a fox"])
    with applied(pipe, tmp_path, audit_key), torch.inference_mode():
        assert rowwise(draw(pipe, ["a ghost", "a fox"]), base) == [False, True]


@pytest.mark.parametrize("abort", [False, True])
def test_every_run_is_recorded_however_the_one_before_ended(
    abort: bool, pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    """One-step runs without decoding, and runs after one that was stopped at its first step, start where it was."""

    def stop(_pipe: Any, _step: int, _t: Any, _values: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with applied(pipe, tmp_path, audit_key):
        for _ in range(3):
            options: dict[str, Any] = dict(num_inference_steps=3 if abort else 1, output_type="latent")
            if abort:
                with pytest.raises(KeyboardInterrupt):
                    pipe("a fox", callback_on_step_end=stop, **options)
            else:
                pipe("a fox", **options)
    gated = records(tmp_path, "gated")
    assert len({r.request.id for r in gated if r.request}) == len(gated) == 3
