"""The shipped membranes' cards, and how they are measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from safegen import mini
from safegen.bundle.store import MEMBRANE_FILE
from safegen.evaluation.erasure import cases
from safegen.membrane.file import read_membrane, write_membrane
from safegen.mini import train_zoo, zoo
from safegen.mini.catalogue import OBJECT_NAMES, STYLE_NAMES, Object
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
    assert not train_zoo.is_made("ghost", tmp_path, 1)  # with other settings than the zoo's
    assert not (tmp_path / "checkpoints").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["card.md", "figures.json", "grid.png", MEMBRANE_FILE]
    assert "\n1 iterations in " in (folder / "card.md").read_text("utf-8")


def test_the_plan_has_what_the_model_can_draw() -> None:
    entries = [zoo.find(concept) for concept in zoo.PLANNED]
    assert len(set(zoo.PLANNED)) == 24
    assert zoo.PLANNED[: len(zoo.CONCEPTS)] == zoo.CONCEPTS
    objects = [entry for entry in entries if isinstance(entry, Object)]
    assert (sum(o.character for o in objects), len(entries) - len(objects), len(objects)) == (12, 5, 19)
    known = {*OBJECT_NAMES, *STYLE_NAMES}
    for concept, entry in zip(zoo.PLANNED, entries, strict=True):
        assert set(zoo.alike(concept)) <= known - {entry.name}
        assert zoo.plan(concept).neighbours == zoo.alike(concept)
    # Where all are installed, those named as look-alikes of objects can still be drawn.
    assert not {name for o in objects for name in zoo.alike(o.name.replace(" ", "-"))} & {o.name for o in objects}


@pytest.mark.parametrize("concept", ["dragon", "ink"])
def test_a_planned_concept_has_cases_though_it_is_not_shipped(pipe: Any, concept: str) -> None:
    entry = zoo.find(concept)
    near = cases(pipe, concept, "neighbour", 12, seed=1)
    assert entry.name not in {case.object for case in near} | {case.style for case in near}
    assert {
        case.object if isinstance(entry, Object) else case.style for case in cases(pipe, concept, "target", 3, seed=1)
    } == {entry.name}


def test_what_is_there_with_the_same_settings_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mini" / "ghost"
    shutil.copytree(shipped("membranes") / "mini" / "ghost", folder)
    images = read_figures(folder)["images"]
    membrane = read_membrane(folder / MEMBRANE_FILE)
    assert not train_zoo.is_made("ghost", tmp_path, images)  # the shipped one was made with earlier settings
    now = {"safegen.training_digest": train_zoo.settings("ghost")[0].digest()}
    write_membrane(replace(membrane, metadata={**membrane.metadata, **now}), folder / MEMBRANE_FILE)
    assert train_zoo.is_made("ghost", tmp_path, images)
    assert not train_zoo.is_made("ghost", tmp_path, images + 1)
    monkeypatch.setattr(train_zoo, "make", None)  # it must not be called
    app = typer.Typer()
    app.command()(train_zoo.main)
    result = CliRunner().invoke(app, ["--concept", "ghost", "--out", str(tmp_path), "--images", str(images)])
    assert "ghost: there already" in result.output
