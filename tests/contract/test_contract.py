"""What safegen promises of every family that it supports: the same tests on a tiny pipeline of each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import CASES, Case
from tiny import applied, random_membrane, records, rowwise, same_state, state_of
from torch import Tensor

from safegen.audit import HmacKey
from safegen.backend import Backend, backend_of
from safegen.backend.injection import Injection, Opening
from safegen.backend.sites import plan
from safegen.errors import AttestationError, CoverageError, TrainingError
from safegen.membrane.file import read_membrane, write_membrane
from safegen.membrane.formats import write_peft
from safegen.membrane.weights import Factor, Membrane
from safegen.training.config import TrainConfig
from safegen.training.recipe import Trainer

GHOST, FOX = "a ghost", "a fox"
PROMPTS = [GHOST, FOX]  # the first opens the membrane fully, the second leaves it shut


@functools.cache
def shared(case: Case) -> Any:
    """The pipeline of a case, for tests that leave it as it was."""
    return case.build()


@functools.cache
def base_images(case: Case) -> Tensor:
    return case.draw(shared(case), PROMPTS)


def supporting(feature: str) -> pytest.MarkDecorator:
    """The cases that support a feature."""
    chosen = [case for case in CASES if feature not in case.refused]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def guard(case: Case, pipe: Any, folder: Path, key: HmacKey, **policy: Any) -> Any:
    return applied(pipe, folder, key, membranes=[membrane_for(case)], **policy)


@functools.cache
def membrane_for(case: Case) -> Membrane:
    return random_membrane(shared(case), floor=1.0)


@every
def test_every_linear_and_convolution_of_every_block_is_a_site(case: Case) -> None:
    backend = backend_of(shared(case))
    assert len(backend.sites.modules) == case.sites
    modules = dict(backend.denoiser.named_modules())
    assert all(modules[name] is module for name, module in backend.sites.modules.items())
    assert len(backend.sites.by_key()) == case.sites  # no two share a file key


@every
def test_each_row_is_gated_by_its_own_prompt(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe, base = shared(case), base_images(case)
    with guard(case, pipe, tmp_path, audit_key):
        assert rowwise(case.draw(pipe, PROMPTS), base) == [False, True]
        assert not torch.equal(case.draw(pipe, [FOX, GHOST])[1], case.draw(pipe, [FOX, FOX])[1])
    gated = [(record.verdict or record).decision for record in records(tmp_path, "gated")]
    assert {"match", "clear"} <= set(gated)
    drawn = records(tmp_path, "generated")
    assert sum(record.output.n for record in drawn if record.output) == 6
    assert all(record.attest and record.attest.modules_seen == case.sites for record in drawn)


@every
def test_a_prompt_that_no_rule_touches_is_the_base_models_bit_for_bit(
    case: Case, tmp_path: Path, audit_key: HmacKey
) -> None:
    pipe = shared(case)
    plain = case.draw(pipe, [FOX])
    with guard(case, pipe, tmp_path, audit_key):
        assert torch.equal(case.draw(pipe, [FOX]), plain)
    assert all(not m.opened for record in records(tmp_path, "gated") for m in record.membranes)


@every
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


def small(backend: Backend) -> tuple[int, ...]:
    """The shape of small latents."""
    channels, *sizes = backend.latent_shape
    return channels, *(min(size, 8) for size in sizes)


def predicted(pipe: Any, states: Tensor) -> Tensor:
    backend = backend_of(pipe)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, *small(backend), generator=generator)
    with torch.no_grad():
        return backend.predict(torch.cat([x] * len(states)), torch.full((len(states),), 500.0), states)


@every
def test_conditioning_of_unknown_origin_opens_everything(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = shared(case)
    own = backend_of(pipe).condition([FOX, FOX])
    noisy = torch.stack([own[0], own[1] + 1e-3 * own[1].ne(0)])
    plain = predicted(pipe, noisy)
    with guard(case, pipe, tmp_path, audit_key):
        backend_of(pipe).condition([FOX, FOX])  # now it is seen where this comes from
        assert rowwise(predicted(pipe, noisy), plain) == [True, False]
    (record,) = [record for record in records(tmp_path, "gated") if "embeds_only" in record.inputs]
    assert [membrane.permeability for membrane in record.membranes] == [1.0]


@every
def test_every_text_encoder_is_read(case: Case, tmp_path: Path, audit_key: HmacKey) -> None:
    """Conditioning whose part for one encoder alone is another text's opens for that text."""
    pipe = shared(case)
    backend = backend_of(pipe)
    names = list(backend.text_encoders)
    if len(names) == 1:
        return
    for number in range(1, len(names) + 1):
        option = "prompt" if number == 1 else f"prompt_{number}"
        texts = {"prompt": [FOX], **({} if number == 1 else {option: [GHOST]})}
        if number > 1 and option not in pipe.encode_prompt.__code__.co_varnames:
            continue
        others = {key: value for key, value in texts.items() if key != "prompt"}
        plain = case.draw(pipe, [FOX], **others)
        with guard(case, pipe, tmp_path / option, audit_key):
            assert torch.equal(case.draw(pipe, [FOX], **others), plain) == (number == 1), option


@every
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
    weights = state_of(backend.denoiser, *backend.text_encoders.values())
    requires = {p: p.requires_grad for p in backend.denoiser.parameters()}
    live = Membrane(membrane.concept, membrane.targets, membrane.base, membrane.architecture, factors)
    injection = Injection(backend.denoiser, backend.sites, [live], backend.family)
    injection.attach(lambda _args, _kwargs: Opening(2, (0,), torch.ones(2, 1), None), lambda _: None)
    try:
        for parameter in requires:
            parameter.requires_grad_(False)
        x = torch.randn(2, *small(backend))
        predicted = backend.predict(x, torch.tensor([500.0, 300.0]), backend.condition(PROMPTS))
        assert predicted.shape == x.shape
        predicted.square().mean().backward()
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


@every
def test_the_trainer_takes_what_says_so(case: Case) -> None:
    pipe = shared(case)
    backend = backend_of(pipe)
    if not backend.capabilities.trains:
        assert "training" in case.refused
        return
    assert "training" not in case.refused
    settings: dict[str, Any] = {"iterations": 1, "batch": 1, "anchor_batch": 2, "trajectory_steps": 2}
    config = TrainConfig(concept="ghost", targets=("ghost",), **settings)
    weights = state_of(backend.denoiser)
    try:
        trained = Trainer(backend, config, ["a fox", "a robot"], pipe.scheduler).run()
    except TrainingError as error:
        pytest.fail(str(error))
    assert len(trained.factors) == case.sites
    assert same_state(weights, state_of(backend.denoiser))
