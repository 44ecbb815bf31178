"""Recipes as documents: read strictly, filled up from presets and the catalogue, and each of the shipped ones works."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny import tiny_sd

from safegen.backend import backend_of
from safegen.cli.train_run import run_of_recipe
from safegen.errors import RecipeError, UsageError
from safegen.resources import shipped
from safegen.training.config import Settings
from safegen.training.document import find_recipe, load_recipe
from safegen.training.presets import APPLICATIONS, FAMILIES, Application, Family, Method, preset
from safegen.training.recipe import Trainer

FOLDER = shipped("membranes") / "recipes"
NAMES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))
HEAD = "apiVersion: safegen.dev/v1\nkind: Recipe\nmetadata: {id: r, version: 1.0.0}\nmodel: mini\nfamily: mini\n"
# What a step on a tiny pipeline cannot take from a recipe for a large one.
TINY: dict[str, Any] = dict(
    iterations=1, trajectory_steps=2, latent_sizes=(8,), optimizer="adamw", warmup=0, schedule="constant",
    learning_rate=0.05,
)  # fmt: skip


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(HEAD + text, "utf-8")
    return path


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_load_and_say_that_nobody_trained_them(name: str, method: Method) -> None:
    run = run_of_recipe(name, method, None, None, {})
    (config,) = run.configs
    family, concept = name.split("/")
    assert (run.family, config.concept) == (family, concept)
    assert config.anchors == ("paper" if method == "paper" else "neighbours")
    assert config.neighbours
    assert not {target.lower() for target in config.targets} & {caption.lower() for caption in run.pool}
    assert len(run.pool) > 300
    text = find_recipe(name).read_text("utf-8")
    assert "Nobody has trained it here" in text
    assert ("no backend for SDXL yet" in text) == (family == "sdxl")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("sd1/")])
def test_shipped_recipes_take_a_step_on_a_tiny_pipeline_of_their_family(name: str) -> None:
    pipe = tiny_sd()
    run = run_of_recipe(name, None, None, None, TINY)
    membrane = Trainer(backend_of(pipe), run.configs, run.pool[:40], pipe.scheduler).run()
    assert all(f.up.any() for f in membrane.factors.values())
    assert membrane.surrogate == {"sd1/joker": "Batman", "sd1/luke-skywalker": "Darth Vader"}.get(name, "")


def test_the_papers_settings_take_a_step_too() -> None:
    pipe = tiny_sd()
    run = run_of_recipe("sd1/snoopy", "paper", None, None, TINY)
    assert torch.isfinite(
        next(Trainer(backend_of(pipe), run.configs, run.pool[:40], pipe.scheduler).run().tensors())[1]
    ).all()


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("application", get_args(Application))
@pytest.mark.parametrize("family", get_args(Family))
def test_every_preset_is_made_of_settings(family: Family, application: Application, method: Method) -> None:
    found = Settings(**preset(family, application, method))
    assert (family in FAMILIES, application in APPLICATIONS) == (True, True)
    assert found.alpha / found.rank == 1  # "no difference" on SDXL: alpha 1 at rank 32


def test_the_papers_numbers() -> None:
    snoopy, nudity = (Settings(**preset("sd1", kind, "paper")) for kind in ("object", "explicit"))
    assert (snoopy.iterations, snoopy.anchoring, snoopy.eta, snoopy.learning_rate) == (3000, 1000.0, 1.0, 1e-4)
    assert (snoopy.schedule, snoopy.warmup, snoopy.cycles, snoopy.batch, snoopy.anchor_batch) == (
        "restarts",
        500,
        3,
        1,
        4,
    )
    assert (nudity.iterations, nudity.anchoring, nudity.eta) == (15000, 100.0, 3.0)


def test_what_is_written_wins_over_presets_and_what_is_given_over_both(tmp_path: Path) -> None:
    path = written(tmp_path, "application: explicit\nconcepts: [{concept: ghost}]\nsettings: {eta: 2, rank: 3}\n")
    recipe = load_recipe(path)
    assert recipe.chosen() == {**preset("mini", "explicit", "ours"), "eta": 2.0, "rank": 3}
    assert recipe.chosen(None, rank=4, eta=None)["rank"] == 4
    assert recipe.chosen("paper")["iterations"] == 15000
    (config,) = run_of_recipe(str(path), None, None, None, {"seed": 7}).configs
    assert (config.seed, config.eta, config.open_share) == (7, 2.0, 0.5)


def test_several_concepts_are_held_out_of_each_others_anchors(tmp_path: Path) -> None:
    path = written(tmp_path, "application: object\nconcepts: [{concept: ghost}, {concept: fox, surrogate: owl}]\n")
    run = run_of_recipe(str(path), None, None, None, {})
    assert [(c.concept, c.surrogate) for c in run.configs] == [("ghost", ""), ("fox", "owl")]
    assert not any("ghost" in caption.split() or "fox" in caption.split() for caption in run.pool)
    assert "an owl" in run.pool


def test_the_pool_lies_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a fox\na phantom\nan owl\n", "utf-8")
    path = written(tmp_path, "application: object\nconcepts: [{concept: ghost}]\npool: captions.txt\n")
    assert run_of_recipe(str(path), None, None, None, {}).pool == ("a fox", "an owl")


FAULTS = {
    "concepts: [{concept: ghost}]": ["1:1: missing key 'application'"],
    "application: stile\nconcepts: [{concept: ghost}]": ["6:14: unknown application 'stile'. Did you mean 'style'?"],
    "application: style\nconcepts: []": ["concepts: expected at least one entry"],
    "application: style\nconcepts: [{concept: ghost}]\nsettings: {iterationz: 3, rank: 0, eta: '1'}": [
        "unknown key 'iterationz'. Did you mean 'iterations'?",
        "rank: expected greater than or equal to 1",
        "8:41: eta: expected a number; found '1'",
    ],
    "application: style\nconcepts: [{concept: ghost, templates: [[a ghost, a]]}]": ["expected {} once"],
    "application: style\nconcepts:\n  - concept: ghost\n  - concept: ghost": ["concept 'ghost' is there already"],
    "application: style\nconcepts: &a [{concept: ghost}]": ["anchor &a is refused"],
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_are_named_with_their_places_all_at_once(text: str, tmp_path: Path) -> None:
    path = written(tmp_path, text + "\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for part in FAULTS[text]:
        assert part in str(caught.value)
    assert all(line.startswith(f"{path}:") for line in str(caught.value).splitlines())


def test_a_recipe_that_is_nowhere() -> None:
    with pytest.raises(RecipeError, match="neither a file nor a shipped recipe. Did you mean 'sd1/van-gogh'"):
        find_recipe("sd1/vangogh")


def test_a_concept_that_nobody_knows_needs_names(tmp_path: Path) -> None:
    path = written(tmp_path, "application: object\nconcepts: [{concept: zorblax}]\n")
    with pytest.raises(UsageError, match="draws nothing of that name"):
        run_of_recipe(str(path), None, None, None, {})
    path = written(tmp_path, "application: memorised\nconcepts: [{concept: zorblax, targets: [Zorblax]}]\n")
    (config,) = run_of_recipe(str(path), None, "some/model", None, {}).configs
    assert ("a reproduction of {}", "a reproduction") in config.templates
