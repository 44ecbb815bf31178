"""What safegen promises of every family that it supports: the same tests on a tiny pipeline of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import (
    FLOW,
    FOX,
    GHOST,
    HUNYUAN_TRAINING,
    MIXED_ROWS,
    NO_NEGATIVE,
    OWN_WORDS,
    PROMPTS,
    Case,
    base_images,
    every,
    feature,
    membrane_for,
    refusing,
    shared,
)
from tiny import applied, random_membrane, records, rowwise, same_state, state_of
from torch import Tensor

from safegen.audit import HmacKey
from safegen.backend import Backend, backend_of
from safegen.backend.families.family import Family
from safegen.backend.injection import Injection, Opening
from safegen.guard import Guard
from safegen.membrane.weights import Factor, Membrane
from safegen.training.config import TrainConfig
from safegen.training.recipe import Trainer


def guard(case: Case, pipe: Any, folder: Path, key: HmacKey) -> Guard:
    return applied(pipe, folder, key, membranes=[membrane_for(case)])


@every
def test_every_linear_and_convolution_of_every_block_is_a_site(case: Case) -> None:
    backend = backend_of(shared(case))
    assert len(backend.sites.modules) == case.sites
    modules = dict(backend.denoiser.named_modules())
    assert all(modules[name] is module for name, module in backend.sites.modules.items())
    assert len(backend.sites.by_key()) == case.sites  # no two share a file key


@feature("per-row gates", "each prompt of a list opens its own row alone, whatever its place; images are recorded")
def test_each_row_is_gated_by_its_own_prompt(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, base = shared(case), base_images(case)
    with guard(case, pipe, tmp_path, audit_key):
        assert rowwise(case.draw(pipe, PROMPTS), base) == [False, True]
        assert not torch.equal(case.draw(pipe, [FOX, GHOST])[1], case.draw(pipe, [FOX, FOX])[1])
    assert {r.verdict.decision for r in records(tmp_path, "gated") if r.verdict} == {"match", "clear"}
    drawn = records(tmp_path, "generated")
    assert sum(record.output.n for record in drawn if record.output) == 6
    assert all(record.attest and record.attest.modules_seen == case.sites for record in drawn)


@feature("closed = base", "a prompt that no rule touches is drawn bit for bit as without a policy")
def test_a_prompt_that_no_rule_touches_is_the_base_models_bit_for_bit(
    case: Case, tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe = shared(case)
    plain = case.draw(pipe, [FOX])
    with guard(case, pipe, tmp_path, audit_key):
        assert torch.equal(case.draw(pipe, [FOX]), plain)
    assert not any(m.opened for record in records(tmp_path, "gated") for m in record.membranes or ())


@feature("remove", "taking the policy off leaves the pipeline as it was, bit for bit")
def test_what_was_applied_comes_off_without_a_trace(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, base = shared(case), base_images(case)
    backend = backend_of(pipe)
    parts = (backend.denoiser, *backend.text_encoders.values())
    before = state_of(*parts)
    with guard(case, pipe, tmp_path, audit_key):
        case.draw(pipe, [GHOST])
    assert same_state(before, state_of(*parts))
    assert "decode" not in pipe.vae.__dict__
    assert "encode_prompt" not in pipe.__dict__
    assert torch.equal(case.draw(pipe, PROMPTS), base)


@every
def test_every_tokenizer_is_read_back(case: Case) -> None:
    """What stands around a prompt (a template, an instruction) is no part of its text."""
    backend = backend_of(shared(case))
    assert isinstance(backend, Family)
    for name, reader in backend.readers.items():
        for text in ("a fox", "a ghost in the style of van gogh"):
            (row,) = reader.tokenise([text]).tolist()
            assert backend.spelled(name, row) == text
            assert [word.strip() for _, word in reader.words(row)] == text.split()
    (row,) = backend.tokenise(["a fox and a ghost"]).tolist()
    cut = backend.tokenise(["a fox"])[0].tolist()
    assert not backend.wrote("a fox", row)
    assert backend.wrote("a fox", cut)


def small(backend: Backend) -> tuple[int, ...]:
    """The shape of small latents."""
    channels, *sizes = backend.latent_shape
    return channels, *(min(size, 8) for size in sizes)


def predicted(pipe: Any, states: Tensor) -> Tensor:
    backend = backend_of(pipe)
    x = torch.randn(1, *small(backend), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return backend.predict(torch.cat([x] * len(states)), torch.full((len(states),), 500.0), states)


@feature("foreign embeddings", "conditioning that no text encoder made opens every membrane fully (`on_unknown: open`)")
def test_conditioning_of_unknown_origin_opens_everything(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    own = backend_of(pipe).condition([FOX, FOX])
    noisy = torch.stack([own[0], own[1] + 1e-3 * own[1].ne(0)])
    plain = predicted(pipe, noisy)
    with guard(case, pipe, tmp_path, audit_key):
        backend_of(pipe).condition([FOX, FOX])  # now it is seen where this comes from
        assert rowwise(predicted(pipe, noisy), plain) == [True, False]
    (record,) = [record for record in records(tmp_path, "gated") if "embeds_only" in (record.inputs or ())]
    assert [membrane.permeability for membrane in record.membranes or ()] == [1.0]


@feature("all encoders", "a concept that only one of several text encoders is told opens its membrane")
def test_every_text_encoder_is_read(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    options = [f"prompt_{k}" for k in (2, 3) if f"prompt_{k}" in type(pipe).__call__.__code__.co_varnames]
    for option in options:
        if option == "prompt_2" and getattr(pipe, "text_encoder", None) is None:
            continue  # the refiner has one encoder, which takes the first
        given: dict[str, Any] = {option: [GHOST]}
        plain = case.draw(pipe, [FOX], **given)
        (tmp_path / option).mkdir()
        with guard(case, pipe, tmp_path / option, audit_key):
            assert not torch.equal(case.draw(pipe, [FOX], **given), plain), option
        (record,) = [r for r in records(tmp_path / option, "gated") if r.verdict and r.verdict.decision == "match"]
        assert [hit.concept for hit in record.hits or ()] == ["ghost"]


@feature("no guidance", "with guidance off (distilled schedules) rows are gated as with guidance")
def test_rows_are_gated_without_guidance(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    plain = case.draw(pipe, PROMPTS, **case.unguided)
    with guard(case, pipe, tmp_path, audit_key):
        assert rowwise(case.draw(pipe, PROMPTS, **case.unguided), plain) == [False, True]


@feature("images per prompt", "all images of a prompt are gated by that prompt")
def test_several_images_of_one_prompt(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    plain = case.draw(pipe, PROMPTS, images=2)
    with guard(case, pipe, tmp_path, audit_key):
        assert rowwise(case.draw(pipe, PROMPTS, images=2), plain) == [False, False, True, True]
    assert [record.output.n for record in records(tmp_path, "generated") if record.output] == [2, 2]


@refusing("images per prompt", MIXED_ROWS)
def test_images_whose_encoders_rows_are_mixed_up(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    plain = case.draw(pipe, PROMPTS, images=2)
    with guard(case, pipe, tmp_path, audit_key):
        # The rows of states are ghost, ghost, fox, fox; those of pooled vectors are ghost, fox, ghost, fox.
        assert rowwise(case.draw(pipe, PROMPTS, images=2), plain) == [False, False, False, True]
        assert rowwise(case.draw(pipe, [FOX], images=2), case.draw(pipe, [FOX], images=2)) == [True, True]


def negative(case: Case, text: str) -> dict[str, Any]:
    """Arguments of a call with a negative prompt."""
    return {**case.guided, "negative_prompt": [text]}


@feature("negative prompts", "a concept named in the negative prompt opens nothing")
def test_a_negative_prompt_opens_nothing(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    assert backend_of(pipe).capabilities.negatives
    options, other = negative(case, GHOST), negative(case, FOX)
    plain = case.draw(pipe, [FOX], **options)
    assert not torch.equal(plain, case.draw(pipe, [FOX], **other))
    with guard(case, pipe, tmp_path, audit_key):
        assert torch.equal(case.draw(pipe, [FOX], **options), plain)


@refusing("negative prompts", OWN_WORDS)
def test_a_negative_prompt_is_judged_by_its_own_words(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    assert not backend_of(pipe).capabilities.negatives
    named, other = negative(case, GHOST), negative(case, "a robot")
    plain, kept = case.draw(pipe, [FOX], **named), case.draw(pipe, [FOX], **other)
    with guard(case, pipe, tmp_path, audit_key):
        assert not torch.equal(case.draw(pipe, [FOX], **named), plain)
        assert torch.equal(case.draw(pipe, [FOX], **other), kept)
        assert not torch.equal(case.draw(pipe, [GHOST], **other), case.draw(pipe, [FOX], **other))
    drawn = [record for record in records(tmp_path, "generated") if record.output]
    assert [m.opened for record in drawn for m in record.membranes or ()] == [False, False, True, False]


@refusing("negative prompts", NO_NEGATIVE)
def test_no_negative_prompt_is_taken(case: Case) -> None:
    assert "negative_prompt" not in type(shared(case)).__call__.__code__.co_varnames[:30]


@feature("gradients", "one training step through the seam changes the membrane alone")
def test_one_training_step_changes_the_membrane_alone(case: Case) -> None:
    pipe = shared(case)
    backend = backend_of(pipe)
    membrane = random_membrane(pipe, size=0.1)
    factors = {
        key: Factor(f.down.requires_grad_(True), f.up.requires_grad_(True), f.alpha)
        for key, f in membrane.factors.items()
    }
    values = [value for f in factors.values() for value in (f.down, f.up)]
    before = [value.detach().clone() for value in values]
    states = backend.condition(PROMPTS)  # also lets transformers install what it keeps on an encoder's first run
    weights = state_of(backend.denoiser, *backend.text_encoders.values())
    requires = {p: p.requires_grad for p in backend.denoiser.parameters()}
    live = Membrane(membrane.concept, membrane.targets, membrane.base, membrane.architecture, factors)
    injection = Injection(backend.denoiser, backend.sites, [live], backend.family)
    injection.attach(lambda _args, _kwargs: Opening(2, (0,), torch.ones(2, 1), None), lambda _: None)
    try:
        for parameter in requires:
            parameter.requires_grad_(False)
        x = torch.randn(2, *small(backend))
        found = backend.predict(x, torch.tensor([500.0, 300.0]), states)
        assert found.shape == x.shape
        found.square().mean().backward()
    finally:
        injection.detach()
        for parameter, value in requires.items():
            parameter.requires_grad_(value)
    # In some families the last block's text half does not reach the output.
    assert sum(value.grad is not None for value in values) > 0.7 * len(values)
    torch.optim.SGD(values, lr=1e-2).step()
    moved = [not torch.equal(value, old) for value, old in zip(values, before, strict=True)]
    assert sum(moved) > len(moved) / 2
    assert same_state(weights, state_of(backend.denoiser, *backend.text_encoders.values()))


def trainer(case: Case) -> Trainer:
    backend, settings = (
        backend_of(shared(case)),
        {"iterations": 1, "batch": 1, "anchor_batch": 2, "trajectory_steps": 2},
    )
    given: dict[str, Any] = settings
    config = TrainConfig(concept="ghost", targets=("ghost",), **given)
    return Trainer(backend, config, ["a fox", "a robot"], shared(case).scheduler)


@feature("training", "`safegen train` makes membranes for it")
def test_the_trainer_changes_the_membrane_alone(case: Case) -> None:
    backend = backend_of(shared(case))
    assert backend.capabilities.trains
    weights = state_of(backend.denoiser)
    trained = trainer(case).run()
    assert len(trained.factors) == case.sites
    assert any(bool(factor.up.any()) for factor in trained.factors.values())
    assert same_state(weights, state_of(backend.denoiser))


@pytest.mark.parametrize("why", [FLOW, HUNYUAN_TRAINING])
def test_what_cannot_be_trained_says_so(why: str) -> None:
    from contract_cases import CASES

    refused = [case for case in CASES if case.refused.get("training") == why]
    assert refused
    assert not any(backend_of(shared(case)).capabilities.trains for case in refused)
