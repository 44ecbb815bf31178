"""Eq. 9 of SPM, against sums written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safegen.errors import FormatError, ShapeMismatchError
from safegen.membrane.delta import Site, Sizes, add_delta, check_fits, delta_norms, pool, stack
from safegen.membrane.weights import Factor, Membrane

SITES: dict[str, tuple[Site, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (4, 7, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (4, 6)),
    "linear on four axes": (nn.Linear(6, 5), (4, 2, 3, 6)),
    "conv 1x1": (nn.Conv2d(6, 5, 1), (4, 6, 3, 3)),
    "conv 3x3 stride 2": (nn.Conv2d(6, 5, 3, stride=2, padding=1), (4, 6, 7, 6)),
    "conv reflect": (nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (4, 6, 5, 5)),
    "conv reflect dilated stride 2": (
        nn.Conv2d(6, 5, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"),
        (4, 6, 7, 6),
    ),
    "conv circular uneven": (nn.Conv2d(6, 5, (1, 3), padding=(0, 1), padding_mode="circular"), (4, 6, 4, 5)),
    "conv dilated": (nn.Conv2d(6, 5, 3, padding=2, dilation=2), (4, 6, 6, 6)),
}


def factor(module: Site, rank: int, alpha: float, seed: int) -> Factor:
    """A random pair that fits a site."""
    generator = torch.Generator().manual_seed(seed)
    tail = [1, 1] if isinstance(module, nn.Conv2d) else []
    down = torch.randn(rank, *module.weight.shape[1:], generator=generator)
    return Factor(down, torch.randn(module.weight.shape[0], rank, *tail, generator=generator), alpha)


def product(pair: Factor) -> Tensor:
    """scale · up down, as a full weight in float64."""
    up, down = pair.up.double().flatten(1), pair.down.double().flatten(1)
    return (pair.alpha / pair.down.shape[0]) * (up @ down).view(-1, *pair.down.shape[1:])


def applied(module: Site, weight: Tensor, x: Tensor) -> Tensor:
    """What the site would compute with another weight and no bias, in float64."""
    twin: Any
    if isinstance(module, nn.Linear):
        twin = nn.Linear(module.in_features, module.out_features, bias=False)
    else:
        twin = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # pyright: ignore[reportArgumentType]
            module.stride,  # pyright: ignore[reportArgumentType]
            module.padding,  # pyright: ignore[reportArgumentType]
            module.dilation,  # pyright: ignore[reportArgumentType]
            bias=False,
            padding_mode=module.padding_mode,  # pyright: ignore[reportArgumentType]
        )
    twin.weight = nn.Parameter(weight)
    with torch.no_grad():
        return twin(x.double())


def sized(gamma: Tensor, pairs: list[Factor]) -> Sizes:
    """Coefficients per membrane [rows, n] to sizes per stacked rank."""
    return Sizes.of(gamma, [p.rank for p in pairs], [p.scale for p in pairs])


def delta(module: Site, x: Tensor, pairs: list[Factor], gamma: Tensor) -> Tensor:
    """The delta alone: added to zeros."""
    zeros = torch.zeros_like(module(x))
    return add_delta(module, x, zeros, stack(pairs).to(x), sized(gamma, pairs), None)


def norms(module: Site, x: Tensor, pairs: list[Factor], gamma: Tensor) -> Tensor:
    """Each membrane's own output, measured."""
    return delta_norms(module, x, stack(pairs).to(x), sized(gamma, pairs), [p.rank for p in pairs])


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("ranks", [(1,), (3,), (1, 4, 2)])
def test_eq_9_is_the_sum_of_products(name: str, ranks: tuple[int, ...]) -> None:
    module, shape = SITES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=generator)
    pairs = [factor(module, rank, alpha=0.5 + 2 * k, seed=k) for k, rank in enumerate(ranks)]
    gamma = torch.rand(len(x), len(pairs), generator=generator) * 2
    with torch.no_grad():
        y = module(x)
        found = add_delta(module, x, y.clone(), stack(pairs).to(x), sized(gamma, pairs), None)
    wanted = y.double()
    for k, pair in enumerate(pairs):
        size = gamma[:, k].double().view(-1, *[1] * (y.ndim - 1))
        wanted = wanted + size * applied(module, product(pair), x)
    assert (wanted - y).abs().max() > 1
    torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("name", SITES)
def test_rows_are_opened_by_their_index(name: str) -> None:
    module, shape = SITES[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    pairs = [factor(module, 2, 1.0, 0), factor(module, 1, 3.0, 1)]
    gamma = torch.tensor([[0.5, 1.0], [2.0, 0.25]])
    with torch.no_grad():
        y = module(x)
        some = add_delta(module, x, y.clone(), stack(pairs).to(x), sized(gamma, pairs), torch.tensor([3, 1]))
        alone = {
            row: add_delta(module, x[[row]], y[[row]], stack(pairs).to(x), sized(gamma[[k]], pairs), None)[0]
            for k, row in enumerate((3, 1))
        }
    assert torch.equal(some[[0, 2]], y[[0, 2]])
    for row, wanted in alone.items():
        torch.testing.assert_close(some[row], wanted, atol=1e-5, rtol=1e-5)
        assert not torch.equal(some[row], y[row])


@pytest.mark.parametrize("name", SITES)
def test_closed_rows_keep_every_bit_while_others_are_open_and_activations_overflow(name: str) -> None:
    module, shape = SITES[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3)).half()
    x[0], x[1].view(-1)[0] = torch.inf, torch.nan
    y = torch.randn(module(x.float()).shape, generator=torch.Generator().manual_seed(4)).half()
    y[0], y[1] = -0.0, torch.inf
    pairs = [factor(module, 2, 1.0, 0)]
    with torch.no_grad():
        found = add_delta(module, x, y.clone(), stack(pairs).to(x), sized(torch.ones(1, 1), pairs), torch.tensor([2]))
    closed = [0, 1, 3]
    assert torch.equal(found[closed].view(torch.int16), y[closed].view(torch.int16))  # bits: -0.0 and inf stay
    assert torch.isfinite(found[2]).all()
    assert not torch.equal(found[2], y[2])


def test_a_membrane_shut_for_a_row_is_left_out_though_the_row_is_open_for_another() -> None:
    module = nn.Linear(2, 2, bias=False)
    x = torch.full((2, 1, 2), 300.0).half()
    fine = Factor(torch.full((1, 2), 0.01), torch.ones(2, 1), 1.0)
    overflowing = Factor(torch.full((1, 2), 9e3), torch.ones(2, 1), 1.0)  # 5.4e6 is infinite in fp16
    gamma = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pairs = [fine, overflowing]
    y = torch.zeros(2, 1, 2).half()
    found = add_delta(module, x, y.clone(), stack(pairs).to(x), sized(gamma, pairs), None)
    torch.testing.assert_close(found[0], torch.full((1, 2), 6.0).half(), atol=0.01, rtol=0)
    assert not torch.isfinite(found[1]).any()
    assert torch.isfinite(norms(module, x, pairs, gamma)[0]).all()


@given(
    name=st.sampled_from(sorted(SITES)),
    gamma=st.floats(0.0078125, 4, width=16),
    rank=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_the_delta_is_linear_in_gamma(name: str, gamma: float, rank: int, seed: int) -> None:
    module, shape = SITES[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    pairs = [factor(module, rank, 1.5, seed)]
    with torch.no_grad():
        full, part = (delta(module, x, pairs, torch.full((len(x), 1), g)) for g in (1.0, gamma))
    torch.testing.assert_close(part, gamma * full, atol=1e-4 * gamma, rtol=1e-4)


@given(name=st.sampled_from(sorted(SITES)), seed=st.integers(0, 1000), order=st.permutations(range(3)))
@settings(max_examples=40, deadline=None)
def test_membranes_add_and_their_order_does_not_matter(name: str, seed: int, order: list[int]) -> None:
    module, shape = SITES[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    pairs = [factor(module, 1 + k, 1.0, seed + k) for k in range(3)]
    gamma = torch.rand(len(x), 3, generator=generator)
    with torch.no_grad():
        together = delta(module, x, pairs, gamma)
        apart = sum(delta(module, x, [pairs[k]], gamma[:, [k]]) for k in range(3))
        shuffled = delta(module, x, [pairs[k] for k in order], gamma[:, order])
    assert isinstance(apart, Tensor)
    torch.testing.assert_close(together, apart, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(together, shuffled, atol=2e-4, rtol=1e-4)


def reference(pairs: list[Factor], gamma: list[float]) -> Tensor:
    """What the reference code composes (Con6924/SPM, infer_spm.py:132-142): factors are summed before the product."""
    up = sum((g * pair.up.double() for g, pair in zip(gamma, pairs, strict=True)), torch.zeros(1, dtype=torch.float64))
    down = sum((g * p.down.double() for g, p in zip(gamma, pairs, strict=True)), torch.zeros(1, dtype=torch.float64))
    return up @ down


def test_the_reference_codes_cross_terms_are_not_ours() -> None:
    module = nn.Linear(40, 30, bias=False)
    pairs = [factor(module, 1, 1.0, k) for k in range(2)]
    gamma = [0.9, 0.3]
    eye = torch.eye(40)
    with torch.no_grad():
        found = delta(module, eye, pairs, torch.tensor([gamma]).expand(40, 2)).double().T
    sum_of_products = gamma[0] * product(pairs[0]) + gamma[1] * product(pairs[1])
    torch.testing.assert_close(found, sum_of_products, atol=1e-5, rtol=1e-5)
    theirs = reference(pairs, gamma)
    assert torch.linalg.matrix_rank(found, atol=1e-4) == 2
    assert torch.linalg.matrix_rank(theirs, atol=1e-4) == 1
    assert (theirs - found).norm() / found.norm() > 0.3
    # One membrane acts at γ² there; at γ = 1 the two agree.
    torch.testing.assert_close(reference(pairs[:1], [0.5]), 0.25 * product(pairs[0]))
    torch.testing.assert_close(reference(pairs[:1], [1.0]), product(pairs[0]))


@pytest.mark.parametrize("name", SITES)
def test_norms_are_those_of_the_written_out_products(name: str) -> None:
    module, shape = SITES[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    pairs = [factor(module, 2, 3.0, 0), factor(module, 1, 1.0, 1)]
    gamma = torch.rand(len(x), 2, generator=torch.Generator().manual_seed(6))
    gamma[0, 1] = 0
    with torch.no_grad():
        found = norms(module, x, pairs, gamma)
    wanted = torch.stack(
        [gamma[:, k].double() * applied(module, product(p), x).flatten(1).norm(dim=1) for k, p in enumerate(pairs)], 1
    )
    assert found[0, 1] == 0
    torch.testing.assert_close(found.double(), wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stacks_take_the_dtype_of_what_they_meet(dtype: torch.dtype) -> None:
    pairs = [Factor(torch.ones(2, 3), torch.ones(4, 2), 6.0), Factor(torch.ones(1, 3), torch.ones(4, 1), 6.0)]
    stacked = stack(pairs)
    assert stacked.to(torch.zeros(1)) is stacked
    half = stacked.to(torch.zeros(1, dtype=dtype))
    assert half.down.dtype == half.up.dtype == dtype
    assert half.down.shape == (3, 3)
    assert half.up.shape == (3, 4)


def test_pooled_membranes_are_the_same_and_stack_without_a_copy() -> None:
    generator = torch.Generator().manual_seed(0)

    def membrane(name: str, rank: int, *keys: str) -> Membrane:
        factors = {
            key: Factor(
                torch.randn(rank, 6, *tail, generator=generator),
                torch.randn(5, rank, *[1 for _ in tail], generator=generator),
                2.0,
            )
            for key in keys
            for tail in ([3, 3] if key == "conv" else [],)
        }
        return Membrane(name, (name,), "mini", "", factors)

    given = [membrane("a", 1, "linear", "conv"), membrane("b", 3, "conv"), membrane("c", 2, "linear", "conv")]
    found = pool(given)
    for before, after in zip(given, found, strict=True):
        assert before.concept == after.concept
        assert before.factors.keys() == after.factors.keys()
        for key, factor in before.factors.items():
            assert torch.equal(factor.down, after.factors[key].down)
            assert torch.equal(factor.up, after.factors[key].up)
            assert factor.alpha == after.factors[key].alpha
    for key in ("linear", "conv"):
        factors = [m.factors[key] for m in found if key in m.factors]
        stacked = stack(factors)
        assert stacked.down.data_ptr() == factors[0].down.data_ptr()
        assert stacked.up.data_ptr() == factors[0].up.data_ptr()
        apart = stack([m.factors[key] for m in given if key in m.factors])
        assert torch.equal(stacked.down, apart.down)
        assert torch.equal(stacked.up, apart.up)
        some = stack(factors[1:])
        assert torch.equal(some.down, apart.down[factors[0].rank :])


@pytest.mark.parametrize(
    ("module", "pair"),
    [
        (nn.Linear(6, 5), Factor(torch.zeros(2, 7), torch.zeros(5, 2), 1.0)),
        (nn.Linear(6, 5), Factor(torch.zeros(2, 6), torch.zeros(4, 2), 1.0)),
        (nn.Linear(6, 5), Factor(torch.zeros(2, 6, 1, 1), torch.zeros(5, 2, 1, 1), 1.0)),
        (nn.Conv2d(6, 5, 3), Factor(torch.zeros(2, 6, 1, 1), torch.zeros(5, 2, 1, 1), 1.0)),
        (nn.Conv2d(6, 5, 1), Factor(torch.zeros(2, 6), torch.zeros(5, 2), 1.0)),
        (nn.Conv2d(6, 6, 1, groups=2), Factor(torch.zeros(2, 3, 1, 1), torch.zeros(6, 2, 1, 1), 1.0)),
    ],
)
def test_a_factor_that_does_not_fit_is_named_with_its_site(module: Site, pair: Factor) -> None:
    with pytest.raises(ShapeMismatchError, match=r"site down\.0"):
        check_fits("down.0", module, pair)


@pytest.mark.parametrize(
    ("down", "up", "alpha", "error"),
    [
        ((1, 6), (5, 2), 1.0, ShapeMismatchError),
        ((0, 6), (5, 0), 1.0, ShapeMismatchError),
        ((1, 6), (5, 1, 1, 1), 1.0, ShapeMismatchError),
        ((1, 6, 1), (5, 1, 1), 1.0, ShapeMismatchError),
        ((1, 6, 1, 1), (5, 1, 3, 3), 1.0, ShapeMismatchError),
        ((1, 6), (5, 1), 0.0, FormatError),
        ((1, 6), (5, 1), -1.0, FormatError),
        ((1, 6), (5, 1), float("nan"), FormatError),
        ((1, 6), (5, 1), float("inf"), FormatError),
    ],
)
def test_a_pair_that_is_no_pair_is_refused(
    down: tuple[int, ...], up: tuple[int, ...], alpha: float, error: type[Exception]
) -> None:
    with pytest.raises(error):
        Factor(torch.zeros(down), torch.zeros(up), alpha)
