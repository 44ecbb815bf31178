"""The benchmark of the engine runs from end to end; what it measures on a small model means nothing."""

from __future__ import annotations

import importlib
import json

import pytest
import typer
from typer.testing import CliRunner


@pytest.mark.slow
def test_every_claim_has_a_floor_and_the_peers_run_beside_it() -> None:
    pytest.importorskip("peft")
    app = typer.Typer()
    app.command()(importlib.import_module("compose").main)
    result = CliRunner().invoke(app, ["--smoke", "--rounds", "1", "--json"])
    report = json.loads(result.stdout)
    floors = {floor["name"]: floor for floor in report["floors"]}
    assert result.exit_code == (0 if all(floor["holds"] for floor in floors.values()) else 1)
    assert floors["nothing open: bit-identical"]["value"] == 1
    assert 0 < floors["error against a float64 sum, over the base layer's own"]["value"] <= 2
    assert floors["memory over the bytes of the open membranes"]["holds"]
    assert len(floors) == 19
    peers = " ".join(report["peers"])
    assert all(name in peers for name in ("PEFT, fp32, 16", "loop, bf16, 16", "SPM's single adapter, fp32, 16"))
