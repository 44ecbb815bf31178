"""docs/results.md and the README state what was measured, and nothing else."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def report() -> Any:
    return importlib.import_module("report")


def _result(*, holds: bool) -> dict[str, Any]:
    return {
        "benchmark": "A claim",
        "command": "python benchmarks/claim.py --json",
        "model": "safegen-mini",
        "peer": "nothing",
        "images_per_figure": 200,
        "threads": 2,
        "results": {"ghost": {"before": 0.955, "after": 0.0}, "shut prompts": 400},
        "floors": [{"name": "after", "value": 0.0, "bound": "at most", "floor": 0.1, "holds": holds}],
    }


def test_a_page_has_command_floors_and_figures(report: Any) -> None:
    page = report.page([_result(holds=True)])
    assert (
        "\n## A claim\n\n**Every floor holds.** command python benchmarks/claim.py --json; model safegen-mini; " in page
    )
    assert "; images per figure 200; threads 2.\n" in page
    assert "| after | 0 | at most 0.1 | holds |" in page
    assert "| ghost | 95.5% | 0.0% |" in page
    assert "| shut prompts | 400 |  |" in page


def test_a_missed_floor_cannot_be_overlooked(report: Any) -> None:
    page = report.page([_result(holds=False)])
    assert "1 of 1 floors are missed." in page
    assert "| after | 0 | at most 0.1 | **MISSED** |" in page


def test_the_results_page_is_what_the_committed_results_say(report: Any) -> None:
    reports = report.read_reports()
    if not reports:
        pytest.skip("no results are committed yet")
    assert (ROOT / "docs" / "results.md").read_text("utf-8") == report.page(reports)


def test_the_readme_states_the_figures_beside_the_weights(report: Any) -> None:
    assert report.README.read_text("utf-8") == report.readme_text(), "run python benchmarks/report.py"
    assert len(re.findall(r"^\| `[a-z-]+` \|", report.readme_figures(), re.MULTILINE)) == 12
