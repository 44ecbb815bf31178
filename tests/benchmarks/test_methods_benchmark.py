"""The comparison of erasing methods: goes on where it stopped, demands what the issue demands, draws what it says."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from safegen.errors import UsageError
from safegen.evaluation.methods import METHODS
from safegen.evaluation.metrics.shares import Share


@pytest.fixture(scope="module")
def summary() -> Any:
    return importlib.import_module("methods_parts.summary")


def _run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(importlib.import_module("methods").main)
    return CliRunner().invoke(app, ["--targets", "ghost", "--images", "2", "--json", *arguments])


def test_a_comparison_goes_on_where_it_stopped_and_repeats_byte_for_byte(tmp_path: Path) -> None:
    first = _run("--methods", "block-list", "--cache", str(tmp_path / "cache"))
    assert first.exit_code == 1, first.output  # two images of one target are not what the issue demands
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert sorted(name.split("-ghost")[0] for name in kept) == ["block-list"] + ["images"] * 3
    options = ("--markdown", str(tmp_path / "table.md"), "--plot", str(tmp_path / "plot.png"))
    both = _run("--methods", "base,block-list", "--cache", str(tmp_path / "cache"), *options)
    assert {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in kept} == kept
    report, earlier = json.loads(both.stdout), json.loads(first.stdout)
    base, blocked = report["comparisons"]
    assert earlier["comparisons"] == [blocked]
    assert base["figures"]["target"]["after"] == base["figures"]["target"]["before"]
    assert (base["figures"]["identical"], base["figures"]["drift"]) == (1, pytest.approx(0, abs=1e-4))
    assert blocked["figures"]["target"]["after"]["value"] == 0
    assert blocked["figures"]["identical"] == 1
    assert {floor["name"] for floor in report["floors"]} == {"targets", "seeds"}
    table = (tmp_path / "table.md").read_text("utf-8")
    assert "| base | none | 1 | " in table
    assert "| block-list | gate | 1 | 0.0% [0–66] | " in table
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 800


def test_what_a_result_depends_on_is_its_key() -> None:
    cache = importlib.import_module("methods_parts.cache")
    assert cache.describe(METHODS["uce"]) != cache.describe(METHODS["esd-x"].scaled(0.5))
    assert cache.describe(METHODS["esd-x"]) != cache.describe(METHODS["esd-x"].scaled(0.5))
    assert cache.describe(METHODS["esd-x"])["code"] == cache.describe(METHODS["esd-u"])["code"]


def test_comments_do_not_make_a_finished_comparison_stale(tmp_path: Path) -> None:
    cache = importlib.import_module("methods_parts.cache")
    digests: list[str] = []
    for k, text in enumerate(('"""One."""\nx = 1  # a\n', '"""Two."""\nx = 1\n', '"""Two."""\nx = 2\n')):
        path = tmp_path / f"{k}.py"
        path.write_text(text)
        digests.append(cache._code(path))
    assert digests[0] == digests[1] != digests[2]


def test_unknown_concepts_are_named() -> None:
    methods = importlib.import_module("methods")
    assert methods.sets_of(["ghost", "ghost,robot"]) == [("ghost",), ("ghost", "robot")]
    with pytest.raises(UsageError, match=r"no concept 'gost'.*expected ghost, robot"):
        methods.sets_of(["ghost,gost"])


def test_no_caption_to_keep_names_another_target_of_the_set() -> None:
    methods = importlib.import_module("methods")
    alone, both = methods.task_of(["ghost"], 0), methods.task_of(["ghost", "robot"], 0)
    assert "a robot" in alone.keep
    assert "a ghost" not in alone.keep
    assert not {"a robot", "a ghost"} & set(both.keep)
    assert "a fox" in both.keep
    assert [target.anchor for target in both.targets] == ["skull", "alien"]


def _line(summary: Any, method: str, kind: str, *, seen: int, near: int, drift: float) -> Any:
    def share(k: int) -> Share:
        return Share.of(k, 100)

    return summary.Line(
        method=method,
        kind=kind,
        targets=1,
        before=share(100),
        target=share(seen),
        neighbour=share(near),
        unrelated=share(95),
        lost=((96 - near) / 100, 0.0),
        drift=drift,
        pixels=0.5,
        identical=0.25,
        speed=0.9,
        mace=None,
        seconds=60.0,
        cpu_seconds=50.0,
        peak_mb=100.0,
        stored=1e5,
        cells=1,
    )


def _missed(floors: Sequence[Any]) -> list[str]:
    return [floor.name for floor in floors if not floor.holds]


def test_floors_are_those_of_the_issue(summary: Any) -> None:
    ours = _line(summary, "safegen", "adapter", seen=2, near=95, drift=1.0)
    esd = _line(summary, "esd-x", "weights", seen=0, near=80, drift=4.0)
    released = _line(summary, "spm-as-released", "adapter", seen=50, near=96, drift=3.0)
    gate = _line(summary, "block-list", "gate", seen=0, near=96, drift=0.0)
    floors = summary.floors([ours, esd, released, gate], 8, 3)
    assert len(floors) == 9
    assert _missed(floors) == []
    assert floors[-1].name.endswith("(esd-x)")  # the best that erases as much; a gate is no peer
    assert floors[-1].value == pytest.approx(0.075)
    better = _line(summary, "uce", "weights", seen=1, near=96, drift=0.5)
    worse = _line(summary, "safegen", "adapter", seen=9, near=90, drift=2.0)
    assert _missed(summary.floors([ours, esd, better], 8, 3)) == [
        "safegen: kept more than the best that erases as much (uce)"
    ]
    assert _missed(summary.floors([worse, esd, released, better], 3, 1)) == [
        "targets",
        "seeds",
        "safegen: target seen, after",
        "safegen: neighbours lost",
        "safegen: drift against the smaller of ESD's",
        "safegen: drift against SPM as released",
        "safegen: kept more than the best that erases as much (uce)",
    ]


def test_results_are_what_the_report_tabulates(summary: Any) -> None:
    report = importlib.import_module("report")
    text = report.results_table(summary.results([_line(summary, "uce", "weights", seen=1, near=90, drift=0.5)]))
    assert "| uce: target seen | 100.0% | 1.0% |" in text
    assert "| uce: neighbours | 96.0% | 90.0% |" in text
    assert "| uce: others | 95.0% | 95.0% |" in text
    assert "| uce: drift of non-targets | 0.5 |  |" in text
