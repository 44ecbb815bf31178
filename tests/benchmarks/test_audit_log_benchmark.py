"""The benchmark of the audit log measures real processes, kills and disks; a small run misses large floors."""

from __future__ import annotations

import importlib
import json

import typer
from typer.testing import CliRunner


def test_a_small_run_measures_everything_and_says_that_it_was_small() -> None:
    app = typer.Typer()
    app.command()(importlib.import_module("audit_log").main)
    args = ["--kills", "1", "--records", "100", "--damages", "6", "--seconds", "0.02", "--repeats", "1", "--json"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    floors = {floor["name"]: floor for floor in report["floors"]}
    missed = {name for name, floor in floors.items() if not floor["holds"] and "records/s" not in name}
    assert missed == {"kill -9 runs", "records of the damaged log"}
    assert floors["kill -9 runs"]["value"] == 1
    assert report["results"]["kill -9: acknowledged"] > 0
