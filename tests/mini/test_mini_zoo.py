"""The shipped membranes' cards, and how they are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from safegen import mini
from safegen.bundle.store import MEMBRANE_FILE
from safegen.membrane.file import read_membrane
from safegen.mini import train_zoo, zoo
from safegen.mini.measure_zoo import measure, write_measured
from safegen.mini.membrane_card import card_text, read_figures
from safegen.resources import shipped


@pytest.fixture(scope="module")
def pipe() -> Any:
    return mini.load()


@pytest.mark.parametrize("concept", zoo.CONCEPTS)
def test_the_card_states_the_figures_beside_it(concept: str) -> None:
    folder = shipped("membranes") / "mini" / concept
    assert (folder / "card.md").read_text("utf-8") == card_text(folder)
    figures = read_figures(folder)
    assert f"{figures['images']} images per figure" in card_text(folder)
    assert (folder / "grid.png").is_file()


def test_measuring_leaves_the_model_and_the_membrane_as_they_are(pipe: Any, tmp_path: Path) -> None:
    source = shipped("membranes") / "mini" / "ghost" / MEMBRANE_FILE
    (tmp_path / MEMBRANE_FILE).write_bytes(source.read_bytes())
    membrane = read_membrane(source)
    figures, pairs = measure(pipe, mini.load_judge(), membrane, images=2, seconds=3.0, threads=2)
    assert figures["target"][1] == 0.0
    assert "forward" not in pipe.unet.__dict__
    write_measured(tmp_path, figures, pairs)
    card = (tmp_path / "card.md").read_text("utf-8")
    assert "`python -m safegen.mini.measure_zoo --concept ghost --images 2`" in card
    assert "200 iterations in 3 s on 2 cores" in card
    assert "vampire" in card
    assert json.loads((tmp_path / "figures.json").read_text("utf-8"))["images"] == 2
    assert (tmp_path / "grid.png").is_file()
    assert (tmp_path / MEMBRANE_FILE).read_bytes() == source.read_bytes()


def test_training_the_zoo_does_not_overwrite_the_shipped_membranes_unasked() -> None:
    app = typer.Typer()
    app.command()(train_zoo.main)
    result = CliRunner().invoke(app, ["--concept", "ghost"])
    assert result.exit_code == 2
    assert "--out" in result.output


def test_a_membrane_of_the_zoo_is_written_with_its_card(pipe: Any, tmp_path: Path) -> None:
    config, _ = train_zoo.settings("ghost")
    short = config.model_copy(update={"iterations": 1})
    train_zoo.make(pipe, mini.load_judge(), "ghost", tmp_path, images=1, config=short)
    folder = tmp_path / "mini" / "ghost"
    assert sorted(path.name for path in folder.iterdir()) == ["card.md", "figures.json", "grid.png", MEMBRANE_FILE]
    assert "\n1 iterations in " in (folder / "card.md").read_text("utf-8")
