"""Sums and multiples are those of the products; a lower rank is the best one that there is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_samples import product, same
from torch import Tensor

from safegen.errors import BaseModelMismatchError, FormatError, ShapeMismatchError, UsageError
from safegen.membrane.arithmetic import DERIVED, add, distil, rerank, scale
from safegen.membrane.file import read_membrane, write_membrane
from safegen.membrane.weights import Factor, Membrane

KERNELS: dict[str, tuple[int, ...]] = {"linear": (), "conv 1x1": (1, 1), "conv 3x3": (3, 3), "conv 1x3": (1, 3)}
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pair(
    seed: int, rank: int = 2, kernel: str = "linear", *, alpha: float = 1.5, width: int = 7, height: int = 5
) -> Factor:
    generator = torch.Generator().manual_seed(seed)
    shape = KERNELS[kernel]
    down = torch.randn(rank, width, *shape, generator=generator)
    up = torch.randn(height, rank, *(1 for _ in shape), generator=generator)
    return Factor(down, up, alpha)


def membrane(concept: str = "ghost", **factors: Factor) -> Membrane:
    keyed = {f"lora_unet_{name}": factor for name, factor in factors.items()}
    return Membrane(concept, (concept,), "tiny", "ab", keyed)


def steps(found: Membrane) -> list[dict[str, object]]:
    return json.loads(found.metadata[DERIVED])


def close(found: Tensor, wanted: Tensor, size: Tensor) -> bool:
    """Whether the difference is float32's rounding of the parts (`size`: the norm of all of them)."""
    return bool((found - wanted).norm() <= 4e-7 * size)


@given(
    kernel=st.sampled_from(sorted(KERNELS)),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    alphas=st.lists(st.floats(0.125, 8, width=32), min_size=4, max_size=4),
    seed=st.integers(0, 9999),
)
@QUICK
def test_the_sum_is_that_of_the_products(kernel: str, ranks: list[int], alphas: list[float], seed: int) -> None:
    parts = [
        membrane(f"c{k}", a=pair(seed + k, rank, kernel, alpha=alphas[k]), **{f"own{k}": pair(k)})
        for k, rank in enumerate(ranks)
    ]
    found = add(parts, concept="all")
    products = [product(part.factors["lora_unet_a"]) for part in parts]
    size = torch.stack([p.norm() for p in products]).sum()
    assert close(product(found.factors["lora_unet_a"]), torch.stack(products).sum(0), size)
    assert found.factors["lora_unet_a"].rank == sum(ranks)
    for k, part in enumerate(parts):  # what only one of them has stays as it is
        assert found.factors[f"lora_unet_own{k}"] is part.factors[f"lora_unet_own{k}"]
    turned = add(parts[::-1], concept="all")
    assert close(product(turned.factors["lora_unet_a"]), product(found.factors["lora_unet_a"]), size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_scales_are_added_without_rounding(dtype: torch.dtype) -> None:
    one, two = (Factor(f.down.to(dtype), f.up.to(dtype), f.rank * 0.25) for f in (pair(0, 1), pair(1, 3)))
    found = add([membrane("a", a=one), membrane("b", a=two)], concept="all").factors["lora_unet_a"]
    assert (found.scale, found.down.dtype) == (0.25, dtype)
    assert torch.equal(found.down, torch.cat([one.down, two.down]))
    assert torch.equal(found.up, torch.cat([one.up, two.up], dim=1))


def test_a_sum_opens_wherever_a_part_did() -> None:
    one = replace(membrane("ghost", a=pair(0)), targets=("ghost", "spook"), surrogate="a sheet")
    two = replace(membrane("robot", a=pair(1)), targets=("robot", "spook"), metadata={"note": "second"})
    found = add([one, two], concept="both")
    assert (found.concept, found.targets) == ("both", ("ghost", "spook", "robot"))
    assert (found.base, found.architecture, found.surrogate) == ("tiny", "ab", "")
    assert steps(found) == [
        {
            "op": "add",
            "of": [
                {"concept": "ghost", "surrogate": "a sheet", "metadata": {}},
                {"concept": "robot", "surrogate": "", "metadata": {"note": "second"}},
            ],
        }
    ]
    assert add([one, replace(two, surrogate="a sheet")], concept="both").surrogate == "a sheet"


def test_what_does_not_belong_together_is_not_added() -> None:
    one = membrane(a=pair(0))
    with pytest.raises(UsageError, match="at least one"):
        add([], concept="x")
    with pytest.raises(BaseModelMismatchError, match=r"'tiny' \(ab\), the other for 'sd1'"):
        add([one, replace(membrane("robot", a=pair(0)), base="sd1")], concept="x")
    for other in (pair(0, width=8), pair(0, height=6), pair(0, kernel="conv 1x1")):
        with pytest.raises(ShapeMismatchError, match="'lora_unet_a'"):
            add([one, membrane("robot", a=other)], concept="x")


@given(factor=st.floats(0.0009765625, 1000), seed=st.integers(0, 9999))
@QUICK
def test_a_multiple_is_that_of_the_product(factor: float, seed: int) -> None:
    start = membrane(a=pair(seed), b=pair(seed + 1, kernel="conv 3x3"))
    found = scale(start, factor)
    for key, before in start.factors.items():
        after = found.factors[key]
        assert after.down is before.down
        assert after.up is before.up
        assert after.scale == pytest.approx(before.scale * factor, rel=1e-15)
    assert steps(found) == [{"op": "scale", "factor": factor}]
    assert steps(scale(found, 2))[1] == {"op": "scale", "factor": 2.0}


@pytest.mark.parametrize("factor", [0, -1, -1e-9, math.nan, math.inf, -math.inf])
def test_a_multiple_that_erases_nothing_or_teaches_is_refused(factor: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        scale(membrane(a=pair(0)), factor)


@given(
    kernel=st.sampled_from(sorted(KERNELS)),
    have=st.integers(1, 12),  # also above the widths of the site
    want=st.integers(1, 12),
    seed=st.integers(0, 9999),
)
@QUICK
def test_a_lower_rank_is_the_best_one(kernel: str, have: int, want: int, seed: int) -> None:
    start = membrane(a=pair(seed, have, kernel))
    found = rerank(start, want)
    before, after = product(start.factors["lora_unet_a"]), product(found.membrane.factors["lora_unet_a"])
    values = torch.linalg.svdvals(before)
    assert found.membrane.factors["lora_unet_a"].rank <= want
    lost = values[want:].norm().item() if have > want else 0.0  # Eckart and Young
    assert (before - after).norm().item() == pytest.approx(lost, abs=1e-5 * values[0].item())
    kept = (values[: min(have, want)].square().sum() / values.square().sum()).item()
    assert found.energy == pytest.approx(kept, abs=1e-9)
    assert found.energies == {"lora_unet_a": pytest.approx(kept, abs=1e-9)}
    assert found.membrane.factors["lora_unet_a"].down.shape[1:] == start.factors["lora_unet_a"].down.shape[1:]
    if have <= want:
        assert found.membrane.factors["lora_unet_a"] is start.factors["lora_unet_a"]
        assert found.energy == 1


def test_energy_is_counted_over_all_sites() -> None:
    start = membrane(strong=pair(0, 3, alpha=30), weak=pair(1, 3, alpha=0.3), low=pair(2, 1))
    found = rerank(start, 1)
    squares = {key: torch.linalg.svdvals(product(f)).square() for key, f in start.factors.items()}
    total = sum(s.sum().item() for s in squares.values())
    assert found.energy == pytest.approx(sum(s[0].item() for s in squares.values()) / total)
    assert found.energies["lora_unet_low"] == 1
    assert steps(found.membrane) == [{"op": "rerank", "rank": 1, "energy_kept": found.energy}]


def test_an_empty_site_has_nothing_to_lose() -> None:
    nothing = Factor(torch.randn(3, 7), torch.zeros(5, 3), 1.0)
    found = rerank(membrane(a=nothing), 1)
    assert found.energy == found.energies["lora_unet_a"] == 1
    assert not found.membrane.factors["lora_unet_a"].up.any()


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_is_positive(rank: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        rerank(membrane(a=pair(0)), rank)


@given(ranks=st.lists(st.integers(1, 3), min_size=2, max_size=3), seed=st.integers(0, 9999))
@QUICK
def test_the_rank_of_a_sum_is_enough_to_undo_the_stacking(ranks: list[int], seed: int) -> None:
    """Adding a membrane to itself n times and going back to its rank gives n times its product."""
    start = membrane(a=pair(seed, ranks[0]))
    many = add([start] * len(ranks), concept="ghost")
    found = rerank(many, ranks[0])
    wanted = len(ranks) * product(start.factors["lora_unet_a"])
    assert found.energy == pytest.approx(1)
    torch.testing.assert_close(product(found.membrane.factors["lora_unet_a"]), wanted, atol=1e-4, rtol=1e-4)


def test_a_distilled_membrane_says_where_it_comes_from_and_what_is_left(tmp_path: Path) -> None:
    lora = membrane(a=pair(0, 4), b=pair(1, 8, "conv 3x3"))
    found = distil(lora, 2, layout="peft", sha256="ab" * 32)
    best = rerank(lora, 2)
    assert same(found.membrane.factors, best.membrane.factors)
    assert 0 < found.energy == best.energy < 1
    assert steps(found.membrane) == [
        {"op": "distil", "rank": 2, "energy_kept": found.energy, "layout": "peft", "sha256": "ab" * 32}
    ]
    path = tmp_path / "m.safetensors"
    write_membrane(found.membrane, path)
    back = read_membrane(path)
    assert same(back.factors, found.membrane.factors)
    assert back.metadata == found.membrane.metadata


@pytest.mark.parametrize("text", ["{", '{"op": "add"}', "[" * 100_000])
def test_a_history_that_cannot_be_read_is_not_continued(text: str) -> None:
    with pytest.raises(FormatError, match=r"safegen\.derived"):
        scale(replace(membrane(a=pair(0)), metadata={DERIVED: text}), 2)
