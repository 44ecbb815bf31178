"""Metrics against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm

from safegen import mini
from safegen.evaluation.erasure import Case, Drawn
from safegen.evaluation.metrics.figures import Comparison, figures
from safegen.evaluation.metrics.frechet import frechet_distance
from safegen.evaluation.metrics.harmonic import mace_mean, speed_mean
from safegen.evaluation.metrics.pixels import identical_images, unchanged_pixels
from safegen.evaluation.metrics.shares import Share


def test_the_frechet_distance_is_that_of_the_fitted_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)), 2 * rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + 1
    means, covariances = (a.mean(0), b.mean(0)), (np.cov(a, rowvar=False), np.cov(b, rowvar=False))
    root: Any = sqrtm(covariances[0] @ covariances[1])
    wanted = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 20), st.integers(0, 1000))
def test_the_frechet_distance_is_a_distance_with_few_images_too(n: int, m: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, shift = rng.normal(size=(n, d)), rng.normal(size=(m, d)), rng.normal(size=d)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9)
    assert frechet_distance(a, b) >= 0
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + shift) == pytest.approx(np.square(shift).sum(), abs=1e-6)


@given(st.integers(1, 500), st.data())
def test_a_wilson_interval_is_its_formula(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    share = Share.of(k, n)
    p, z = k / n, 1.959963984540054
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert share.value == p
    assert share.low == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-9)
    assert share.high == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-9)
    assert share.images == n


@pytest.mark.parametrize(
    ("erased", "kept", "printed"),
    [(0.002, 0.712, 0.831), (0.016, 0.877, 0.928), (0.034, 0.843, 0.9), (0.059, 0.855, 0.896)],
)
def test_harmonic_means_are_those_that_the_papers_print(erased: float, kept: float, printed: float) -> None:
    assert speed_mean(erased, kept) == pytest.approx(printed, abs=6e-4)
    assert mace_mean(erased, kept, erased) == pytest.approx(3 / (2 / (1 - erased) + 1 / kept))


def test_harmonic_means_are_0_where_one_part_fails() -> None:
    assert speed_mean(1.0, 0.9) == speed_mean(0.0, 0.0) == mace_mean(0.0, 0.9, 1.0) == 0
    assert speed_mean(0.0, 1.0) == mace_mean(0.0, 1.0, 0.0) == 1


def test_pixels_and_images_that_did_not_change() -> None:
    red, other = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "red")
    other.putpixel((0, 0), (255, 0, 1))
    assert unchanged_pixels([red, red], [red, other]) == 15 / 16
    assert identical_images([red, red], [red, other]) == 0.5


def _drawn(group: Any, names: list[str], seen: list[str], colours: list[str]) -> Drawn:
    cases = tuple(Case("ghost", group, f"a {name}", "ghost" if group == "target" else name, None) for name in names)
    images = tuple(Image.new("RGB", (64, 64), colour) for colour in colours)
    return Drawn(cases, images, tuple(seen), ("noto",) * len(names))


def test_figures_of_a_comparison() -> None:
    judge = mini.load_judge()
    names = ["ghost", "ghost", "phantom", "ghost"]
    target = Comparison(
        "ghost",
        _drawn("target", names, ["ghost"] * 4, ["red"] * 4),
        _drawn("target", names, ["fox", "fox", "ghost", "fox"], ["blue"] * 4),
    )
    near = Comparison(
        "ghost",
        _drawn("neighbour", ["skull", "pig"], ["skull", "pig"], ["green", "black"]),
        _drawn("neighbour", ["skull", "pig"], ["skull", "cow"], ["green", "white"]),
    )
    same = _drawn("unrelated", ["key", "owl"], ["key", "owl"], ["gray", "pink"])
    found = figures(judge, [target], [near], Comparison("ghost", same, same))
    assert (found.target.before.value, found.target.after.value) == (1, 0.25)
    assert (found.neighbour.before.value, found.neighbour.after.value) == (1, 0.5)
    assert (found.unrelated.after.value, found.unchanged_pixels, found.identical) == (1, 1, 1)
    assert found.kept == 0.75
    assert found.speed == pytest.approx(2 / (1 / 0.75 + 1 / 0.75))
    assert found.mace == 0  # the other name of the target is not erased at all
    assert found.drift > 0
    nothing = figures(judge, [target, target], [near], Comparison("ghost", same, same))
    assert nothing.target.after.images == 8
    unmoved = Comparison("ghost", near.before, near.before)
    assert figures(judge, [target], [unmoved], Comparison("ghost", same, same)).drift == pytest.approx(0, abs=1e-5)
