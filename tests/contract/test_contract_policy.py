"""What a policy can ask for beside gates, in every family: static composition, exceptions, records of what is drawn."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import (
    CASES,
    FOX,
    GHOST,
    MODULAR,
    PROMPTS,
    REFERENCE,
    Case,
    base_images,
    every,
    feature,
    membrane_for,
    picture,
    refusing,
    shared,
)
from PIL import Image
from tiny import FIXED, applied, random_membrane, records, rowwise
from torch import Tensor

from safegen import request_context
from safegen.audit import HmacKey

PRESS = (
    "{text: none}\nexceptions:\n  - {id: press, rules: [ghost], when: {tenant: press}, action: flag, "
    "reason: reports on ghosts, owner: a@example.org, expires: 2099-01-01}"
)


def negative(case: Case, text: str) -> dict[str, Any]:
    """Arguments of a call with a negative prompt; of none where the pipeline takes none."""
    takes = "negative_prompt" in inspect.signature(type(shared(case)).__call__).parameters
    return {**case.guided, "negative_prompt": [text]} if takes else {}


@feature("static", "merged once, membranes that are open for every row draw what they draw opened per row")
def test_static_composition_draws_what_runtime_draws(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, options = shared(case), negative(case, "a robot")
    membrane = random_membrane(pipe, size=0.1, floor=1.0)
    plain = case.draw(pipe, [FOX], **options)
    found: dict[str, Tensor] = {}
    for composition in ("runtime", "static"):
        folder = tmp_path / composition
        folder.mkdir()
        with applied(pipe, folder, audit_key, membranes=[membrane], composition=composition, extra=FIXED):
            found[composition] = case.draw(pipe, [FOX], **options)
        assert torch.equal(case.draw(pipe, [FOX], **options), plain)
        for record in records(folder, "gated"):
            assert record.attest is not None
            assert record.attest.composition == composition
            assert [(m.permeability, m.opened) for m in record.membranes or ()] == [(1.0, True)]
    effect = (found["runtime"] - plain).abs().max()
    assert (found["static"] - found["runtime"]).abs().max() < 0.01 * effect


@every
def test_an_exception_holds_in_every_branch_and_is_recorded(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, base, options = shared(case), base_images(case), negative(case, GHOST)
    plain = case.draw(pipe, [GHOST], **options)
    with applied(pipe, tmp_path, audit_key, membranes=[membrane_for(case)], audit=PRESS):
        with request_context(tenant="press"):
            assert torch.equal(case.draw(pipe, [GHOST], **options), plain)
        excepted = records(tmp_path, "gated")
        assert rowwise(case.draw(pipe, PROMPTS), base) == [False, True]
    found = [r for r in excepted if r.verdict and r.verdict.decision == "match"]
    assert found
    assert all([(e.id, e.rule, e.action) for e in r.exceptions or ()] == [("press", "ghost", "flag")] for r in found)
    assert not any(m.opened for record in excepted for m in record.membranes or ())
    assert not any(record.exceptions for record in records(tmp_path, "gated")[len(excepted) :])


def test_an_exception_for_what_another_encoder_reads_is_recorded(tmp_path: Path, audit_key: HmacKey) -> None:
    (case,) = [case for case in CASES if case.name == "flux1"]
    pipe = shared(case)
    plain = case.draw(pipe, [FOX], prompt_2=[GHOST])
    with (
        applied(pipe, tmp_path, audit_key, membranes=[membrane_for(case)], audit=PRESS),
        request_context(tenant="press"),
    ):
        assert torch.equal(case.draw(pipe, [FOX], prompt_2=[GHOST]), plain)
    (record,) = records(tmp_path, "gated")
    assert [(e.id, e.rule, e.action) for e in record.exceptions or ()] == [("press", "ghost", "flag")]


@feature("seeds", "the seeds of the caller's generators are recorded with the images")
def test_the_seed_of_each_image_is_recorded(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    with applied(pipe, tmp_path, audit_key, membranes=[membrane_for(case)]):
        case.draw(pipe, PROMPTS)
    drawn = [record.output for record in records(tmp_path, "generated") if record.output]
    assert [output.seeds for output in drawn] == [("0",), ("1",)]


@refusing("seeds", MODULAR)
def test_images_whose_seeds_are_not_seen_name_none(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    with applied(pipe, tmp_path, audit_key, membranes=[membrane_for(case)]):
        case.draw(pipe, PROMPTS)
    drawn = [record.output for record in records(tmp_path, "generated") if record.output]
    assert [(output.seed, output.seeds) for output in drawn] == [(None, None)] * 2


_FROM_IMAGES = [(case, name) for case in CASES for name in ("img2img", "inpaint") if name in case.further]


@pytest.mark.parametrize(("case", "name"), _FROM_IMAGES, ids=[f"{case.name}-{name}" for case, name in _FROM_IMAGES])
def test_an_image_that_is_drawn_from_is_recorded(case: Case, name: str, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe: Any = case.again(shared(case), case.further[name])
    options = {"mask_image": Image.new("L", (16, 16), 255)} if name == "inpaint" else {}
    with applied(pipe, tmp_path, audit_key, membranes=[membrane_for(case)]):
        pipe(prompt=FOX, image=picture(), num_inference_steps=3, **(dict(case.options) | {"strength": 0.9} | options))
    gated = records(tmp_path, "gated")
    assert gated
    assert {record.inputs for record in gated} == {("image", "mask") if name == "inpaint" else ("image",)}


@refusing("img2img", REFERENCE)
def test_a_reference_image_is_recorded(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    with applied(pipe, tmp_path, audit_key, membranes=[membrane_for(case)]):
        case.draw(pipe, PROMPTS, image=picture(64))
    gated = records(tmp_path, "gated")
    assert gated
    assert {record.inputs for record in gated} == {("image", "embeds_only")}
