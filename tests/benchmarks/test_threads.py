"""The benchmark of threads draws, compares and records; every floor holds on a few images too."""

from __future__ import annotations

import importlib
import json

import typer
from typer.testing import CliRunner


def test_a_few_images() -> None:
    app = typer.Typer()
    app.command()(importlib.import_module("threads").main)
    result = CliRunner().invoke(app, ["--images", "2", "--threads", "2", "--steps", "2", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {floor["name"]: floor["value"] for floor in report["floors"]} == {
        "images that differ from the single-threaded ones": 0,
        "prompts whose recorded permeabilities differ": 0,
        "different sets of permeabilities": report["results"]["different sets of permeabilities"],
        "records that lack or fail": 0,
        "the audit log verifies": 1.0,
    }
    assert report["results"]["images"] == 4
    assert report["peers"]["permeabilities on the modules: images"] == 2
