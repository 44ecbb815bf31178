"""The benchmark of the main claim measures the weights that are there, and fails where a floor is missed."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from safegen import mini


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes the weights that are loaded: every image is one grey."""
    load = mini.load

    def changed() -> Any:
        pipe = load()
        with torch.no_grad():
            pipe.vae.decoder.conv_out.weight.zero_()
        return pipe

    monkeypatch.setattr(mini, "load", changed)


@pytest.mark.usefixtures("broken")
def test_other_weights_miss_floors_and_the_exit_code_tells() -> None:
    app = typer.Typer()
    app.command()(importlib.import_module("end_to_end").main)
    result = CliRunner().invoke(app, ["--images", "1", "--concept", "ghost", "--json"])
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    floors = {floor["name"]: floor for floor in report["floors"]}
    assert floors["model: object as asked"]["value"] < 0.2
    assert floors["model: images examined"]["value"] == 55
    missed = {name for name, floor in floors.items() if not floor["holds"]}
    assert {"model: object as asked", "model: images examined"} <= missed
    assert not {"removed: outputs equal", "all shut prompts whose image changed"} & missed
    scenes = {f"scenes of two objects (1): {seen} seen" for seen in ("target", "other object")}
    assert scenes <= set(report["results"])
