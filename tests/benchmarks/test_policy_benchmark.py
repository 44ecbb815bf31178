"""The benchmark of the policy layer runs, and says of each floor whether it holds."""

from __future__ import annotations

import importlib
import json

import typer
from typer.testing import CliRunner


def test_a_small_round_reports_every_floor() -> None:
    app = typer.Typer()
    app.command()(importlib.import_module("policy").main)
    result = CliRunner().invoke(app, ["--rules", "20", "--aliases", "3", "--rounds", "1", "--json"])
    report = json.loads(result.stdout)
    assert {floor["holds"] for floor in report["floors"]} <= {True, False}
    assert result.exit_code == (0 if all(floor["holds"] for floor in report["floors"]) else 1)
    assert all(seconds >= 0 for seconds in report["results"].values())
    assert any(floor["name"].startswith("resolve 20 rules x 3 phrases") for floor in report["floors"])
