"""Merged weights equal opened membranes within rounding, and the host's own weights stay untouched, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_membrane, same_state, state_of, tiny_sd
from torch import Tensor, nn

from safegen.backend import backend_of
from safegen.backend.injection import Injection, Opening
from safegen.backend.merging import checksums
from safegen.errors import AlreadyAppliedError
from safegen.membrane.delta import Site, Sizes, add_delta, merged_weight, run_with, stack
from safegen.membrane.weights import Factor

SITES: tuple[tuple[Site, tuple[int, ...]], ...] = (
    (nn.Linear(6, 5), (3, 7, 6)),
    (nn.Linear(6, 5, bias=False), (3, 6)),
    (nn.Conv2d(6, 5, 1), (3, 6, 3, 3)),
    (nn.Conv2d(6, 5, 3, stride=2, padding=1), (3, 6, 7, 6)),
    (nn.Conv2d(6, 5, 3, padding=2, dilation=2, padding_mode="reflect"), (3, 6, 6, 6)),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def factors(module: Site, ranks: list[int], seed: int) -> list[Factor]:
    generator = torch.Generator().manual_seed(seed)
    tail = [1, 1] if isinstance(module, nn.Conv2d) else []
    return [
        Factor(
            torch.randn(rank, *module.weight.shape[1:], generator=generator),
            torch.randn(module.weight.shape[0], rank, *tail, generator=generator),
            0.5 * rank,
        )
        for rank in ranks
    ]


@settings(deadline=None, max_examples=60)
@given(
    site=st.sampled_from(SITES),
    members=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.0, 0.25, 1.0, 3.0])), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_static_is_runtime_within_rounding(
    site: tuple[Site, tuple[int, ...]], members: list[tuple[int, float]], seed: int
) -> None:
    module, shape = site
    ranks, sizes = [rank for rank, _ in members], torch.tensor([size for _, size in members])
    found = factors(module, ranks, seed)
    stacked, spread = stack(found), Sizes.of(sizes[None], ranks, [f.scale for f in found])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        rows = Sizes.of(sizes.expand(len(x), -1), ranks, [f.scale for f in found])
        wanted = add_delta(module, x, module(x), stacked, rows, None)
        weight, asked, kept = merged_weight(module.weight, stacked, spread.values[0])
        torch.testing.assert_close(run_with(module, weight, x), wanted, atol=2e-4, rtol=2e-4)
    assert kept == pytest.approx(asked, rel=1e-4)
    exact = sum(
        float(size) * f.scale * (f.up.double().flatten(1) @ f.down.double().flatten(1))
        for size, f in zip(sizes, found, strict=True)
    )
    assert torch.is_tensor(exact)
    wanted = module.weight.detach().double() + exact.view(module.weight.shape)
    torch.testing.assert_close(weight.double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_membrane_of_size_0_is_left_out_whatever_its_factors() -> None:
    module = nn.Linear(6, 5)
    wild = Factor(torch.full((1, 6), torch.inf), torch.ones(5, 1), 1.0)
    weight, asked, kept = merged_weight(module.weight, stack([wild]), torch.zeros(1))
    assert torch.equal(weight, module.weight)
    assert (asked, kept) == (0.0, 0.0)


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from((*DTYPES, torch.float8_e4m3fn)),
    shape=st.sampled_from([(3, 5), (4, 8), (3, 5, 3, 3)]),
    place=st.integers(0, 14),
    seed=st.integers(0, 2**16),
)
def test_any_change_of_one_value_changes_the_checksum(
    dtype: torch.dtype, shape: tuple[int, ...], place: int, seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    changed = weight.clone()
    changed.view(-1)[place] = changed.view(-1)[place].float() + 1
    first, second = checksums([weight, changed])
    assert first != second
    assert checksums([weight.clone(), weight.to(torch.float64)])[0] == first
    assert checksums([weight.to(torch.float64)])[0] != first
    if len(shape) == 4:
        assert checksums([weight.to(memory_format=torch.channels_last)]) == [first]


def predict(pipe: Any) -> Tensor:
    dtype = pipe.unet.dtype
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(3, 16, 32, generator=generator).to(dtype)
    with torch.no_grad():
        return pipe.unet(x, torch.tensor(500), encoder_hidden_states=states).sample


def planned(pipe: Any, seeds: tuple[int, ...] = (1, 2)) -> Injection:
    backend = backend_of(pipe)
    membranes = [random_membrane(pipe, f"c{seed}", seed=seed, rank=seed, size=0.1) for seed in seeds]
    return Injection(backend.denoiser, backend.sites, membranes, backend.family)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_cycles_leaves_every_bit(dtype: torch.dtype) -> None:
    pipe = tiny_sd()
    pipe.unet.to(dtype)
    before, base = state_of(pipe.unet), predict(pipe)
    sizes = torch.tensor([1.0, 0.5])
    outputs: list[Tensor] = []
    for _ in range(5):
        with planned(pipe).holding(sizes):
            outputs.append(predict(pipe))
        assert same_state(before, state_of(pipe.unet))
    found = outputs[0]
    assert all(torch.equal(found, again) for again in outputs)
    assert torch.equal(predict(pipe), base)
    injection = planned(pipe)
    injection.attach(lambda _a, _k: Opening.of(sizes.expand(3, 2), torch.ones(2)), lambda _: None)
    wanted = predict(pipe)
    injection.detach()
    assert found.dtype == dtype
    effect = (wanted.float() - base.float()).norm()
    assert effect > 0.01 * base.float().norm()
    assert (found.float() - wanted.float()).norm() < {4: 1e-5, 2: 0.2}[dtype.itemsize] * effect


@pytest.mark.parametrize("casts", [(torch.bfloat16,), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)])
def test_the_own_weights_follow_the_hosts_casts_and_merged_ones_are_made_of_them(
    casts: tuple[torch.dtype, ...],
) -> None:
    pipe, twin, fresh = tiny_sd(), tiny_sd(), tiny_sd()
    sizes = torch.tensor([1.0, 0.5])
    for dtype in casts:
        twin.unet.to(dtype)
        fresh.unet.to(dtype)
    with planned(fresh).holding(sizes):
        wanted = predict(fresh)
    with planned(pipe).holding(sizes):
        predict(pipe)
        for dtype in casts:
            pipe.unet.to(dtype)
        assert torch.equal(predict(pipe), wanted)
    own, theirs = pipe.unet.state_dict(), twin.unet.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    assert torch.equal(predict(pipe), predict(twin))


def written_in_place(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].proj_in.weight[0, 0] += 1


def written_through_data(pipe: Any) -> None:
    """As PEFT fuses; neither the address nor the version counter tells."""
    pipe.unet.mid_block.attentions[0].proj_in.weight.data[0, 0] += 1


def loaded(pipe: Any) -> None:
    pipe.unet.load_state_dict(tiny_sd(seed=1).unet.state_dict())


@pytest.mark.parametrize("change", [written_in_place, written_through_data, loaded])
def test_what_the_host_writes_to_its_weights_is_in_the_next_image(change: Any) -> None:
    pipe, twin = tiny_sd(), tiny_sd()
    sizes = torch.tensor([1.0, 0.5])
    change(twin)
    with planned(twin).holding(sizes):
        wanted = predict(twin)
    with planned(pipe).holding(sizes):
        first = predict(pipe)
        change(pipe)
        assert torch.equal(predict(pipe), wanted)
    assert not torch.equal(first, wanted)
    assert torch.equal(predict(pipe), predict(twin))


def test_tied_weights_are_each_merged_once() -> None:
    """Two sites on one parameter: each gets its own membranes' sum, as with opened membranes."""
    pipe = tiny_sd()
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    block.to_k.weight = block.to_q.weight
    tied, sizes = block.to_q.weight.detach().clone(), torch.tensor([1.0, 0.5])
    with planned(pipe).holding(sizes):
        found = predict(pipe)
    assert block.to_k.weight is block.to_q.weight
    assert torch.equal(block.to_q.weight, tied)
    injection = planned(pipe)
    injection.attach(lambda _a, _k: Opening.of(sizes.expand(3, 2), torch.ones(2)), lambda _: None)
    torch.testing.assert_close(found, predict(pipe), atol=2e-5, rtol=1e-4)
    injection.detach()


def test_what_is_held_cannot_be_held_again(pipe: Any) -> None:
    sizes = torch.ones(2)
    with planned(pipe).holding(sizes) as injection:
        wanted = predict(pipe)
        with pytest.raises(AlreadyAppliedError):
            planned(pipe)
        assert injection.merged
        assert torch.equal(predict(pipe), wanted)
    assert not injection.merged


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_blocks_run_merged_weights_and_those_that_are_merged_again(when: str) -> None:
    torch._dynamo.reset()
    pipe, eager = tiny_sd(), tiny_sd()
    sizes = torch.tensor([1.0, 0.5])
    base = predict(pipe)
    with planned(eager).holding(sizes):
        wanted = predict(eager)
        loaded(eager)
        again = predict(eager)
    if when == "before":
        pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
        predict(pipe)
    with planned(pipe).holding(sizes):
        if when == "after":
            pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(predict(pipe), wanted)
        loaded(pipe)
        torch.testing.assert_close(predict(pipe), again)
    pipe.unet.load_state_dict(tiny_sd().unet.state_dict())
    assert torch.equal(predict(pipe), base)
