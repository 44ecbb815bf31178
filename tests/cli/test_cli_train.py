"""`safegen train`: a membrane that the other commands find, and a card that says how it was made."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_world import HEAD, Run, World, complaint

from safegen.bundle.store import MEMBRANE_FILE
from safegen.cli.train_plan import plan_for
from safegen.errors import UsageError
from safegen.membrane.file import read_membrane
from safegen.membrane.weights import Membrane
from safegen.mini import zoo
from safegen.training.recipe import Trainer
from safegen.transport.calibration import parse

QUICK = ["--iterations", "2", "--seed", "5", "--rank", "2", "--anchors", "paper", "--surrogate", "a mouse"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "pool.txt"
    path.write_text("the van\na mouse\na photo of a fox\nsanta claus\na mickey\n", "utf-8")
    return path


def test_training_writes_a_membrane_that_the_other_commands_take(
    run: Run, world: World, pool: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ["--concept", "fox", "--model", world.pipeline, "--pool", str(pool), "--out", str(out), *QUICK]
    result = run("train", args)
    assert result.exit_code == 0, result.stderr
    path = out / world.family / "fox" / MEMBRANE_FILE
    assert result.stdout == f"{path}\n"
    assert "training 2/2  erasing " in result.stderr
    assert "1 of 5 captions name the concept and are left out" in result.stderr
    membrane = read_membrane(path)
    settings = json.loads(membrane.metadata["safegen.training"])
    assert (membrane.concept, membrane.targets, membrane.surrogate) == ("fox", ("fox",), "a mouse")
    assert (settings["iterations"], settings["seed"], settings["rank"], settings["anchors"]) == (2, 5, 2, "paper")
    measured = {one.score: one for one in parse(membrane.metadata)}
    assert set(measured) == {"direction", "paper"}
    assert measured["direction"].negatives > 4
    card = path.with_name("card.md").read_text("utf-8")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for part in (sha256, membrane.metadata["safegen.training_digest"], "## Calibration", "| seed | 5 |"):
        assert part in card
    assert "No figures were measured by this command" in card
    assert sorted(p.name for p in path.parent.iterdir()) == ["card.md", MEMBRANE_FILE]

    policy = tmp_path / "policy.yaml"
    policy.write_text(HEAD + "  - {id: no-foxes, concept: fox, category: object}\n", "utf-8")
    use = ["--model", world.pipeline, "--policy", str(policy), "--membranes", str(out)]
    found = json.loads(run("audit", "--prompts", "-", use, "--json", stdin="a fox\n").stdout)
    assert found["prompts"][0]["membranes"][0]["opened"] is True

    again = run("train", args)
    assert again.exit_code == 2
    assert "a membrane is there already" in complaint(again)


def test_what_was_trained_is_kept_when_a_later_step_fails(
    run: Run, world: World, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr("safegen.transport.calibrate.calibrate", interrupted)
    args = ["--concept", "fox", "--model", world.pipeline, "--pool", str(pool), "--out", str(tmp_path / "out"), *QUICK]
    result = run("train", args)
    assert result.exit_code == 5
    assert "unexpected MemoryError: no memory left" in complaint(result)
    assert parse(read_membrane(tmp_path / "out" / world.family / "fox" / MEMBRANE_FILE).metadata) == ()


def test_what_was_trained_is_kept_when_it_cannot_be_written_where_it_belongs(
    run: Run, world: World, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    trained = Trainer.run_all

    def and_then_something_is_in_the_way(self: Trainer, *args: Any) -> tuple[Membrane, ...]:
        membranes = trained(self, *args)
        out.write_text("mine", "utf-8")
        return membranes

    monkeypatch.setattr(Trainer, "run_all", and_then_something_is_in_the_way)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run("train", "--concept", "fox", "--model", world.pipeline, "--pool", pool, "--out", out, *QUICK)
    assert result.exit_code == 2
    message = complaint(result)
    assert message.startswith(f"error: {out / world.family / 'fox' / MEMBRANE_FILE}: could not be written: ")
    (rescued,) = tmp_path.glob("safegen-train-*/*")
    assert f"written to {rescued}" in message
    assert read_membrane(rescued).concept == "fox"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs the proc file system")
def test_a_folder_that_cannot_be_written_is_found_before_training(run: Run, world: World, pool: Path) -> None:
    result = run("train", "--concept", "fox", "--model", world.pipeline, "--pool", pool, "--out", "/proc/x", *QUICK)
    assert result.exit_code == 2
    assert "/proc/x: expected an output folder that can be written to" in complaint(result)
    assert "loading" not in result.stderr


def test_plan_of_a_concept_of_mini_is_that_of_the_zoo() -> None:
    plan, shipped = plan_for("ghost", (), None, "mini"), zoo.plan("ghost")
    assert (plan.targets, plan.templates) == (shipped.targets, shipped.templates)
    assert plan.pool == shipped.pool


def test_plan_of_a_catalogue_concept() -> None:
    artist = plan_for("van-gogh", (), None, "some/model")
    assert artist.targets == ("Van Gogh", "Vincent van Gogh", "van Gough")
    assert ("a painting in the style of {}", "a painting") in artist.templates
    assert not any("gogh" in caption.lower() for caption in artist.pool)
    thing = plan_for("fox", ("a fox", "vixen"), None, "some/model")
    assert thing.targets == ("a fox", "vixen")
    assert ("a photo of {}", "a photo") in thing.templates
    for prompt, _ in (*artist.templates, *thing.templates):
        assert prompt.count("{}") == 1


def test_what_only_sounds_like_the_concept_is_held_in_place() -> None:
    assert "a hot dog" in plan_for("dog", (), None, "mini").pool
    assert "hot dog" in plan_for("dog", (), None, "some/model").pool


def test_a_pool_of_nothing_but_the_concept(tmp_path: Path) -> None:
    path = tmp_path / "pool.txt"
    path.write_text("a fox\nfoxes\n", "utf-8")
    with pytest.raises(UsageError, match="every caption names the concept"):
        plan_for("fox", (), path, "some/model")


def test_inspect_shows_the_training(run: Run, world: World, pool: Path, tmp_path: Path) -> None:
    args = ["--concept", "fox", "--model", world.pipeline, "--pool", str(pool), "--out", str(tmp_path), *QUICK]
    path = Path(run("train", args).stdout.strip())
    found = json.loads(run("inspect", path.parent, "--json").stdout)
    assert found["training_digest"] == read_membrane(path).metadata["safegen.training_digest"]
    assert found["ranks"] == [2]
    shutil.rmtree(path.parent)


RECIPE = (
    "apiVersion: safegen.dev/v1\nkind: Recipe\nmetadata: {id: two, version: 1.0.0}\nmodel: nowhere\nfamily: sd1\n"
    "application: object\nconcepts: [{concept: fox}, {concept: ghost, surrogate: a mouse}]\npool: pool.txt\n"
    "settings: {iterations: 3, batch: 2, anchor_batch: 4, trajectories: 2, trajectory_steps: 2, latent_sizes: [8], "
    "learning_rate: 0.05, warmup: 0, checkpointing: false}\n"
)


@pytest.fixture
def recipe(pool: Path, tmp_path: Path) -> Path:
    (tmp_path / "pool.txt").write_text(pool.read_text("utf-8"), "utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, "utf-8")
    return tmp_path / "recipe.yaml"


def test_a_recipe_trains_all_its_concepts_and_can_be_watched(
    run: Run, world: World, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    watch = ["--grid-every", "2", "--tensorboard", str(tmp_path / "events")]
    result = run("train", recipe, "--model", world.pipeline, "--out", out, "--seed", "4", *watch)
    assert result.exit_code == 0, result.stderr
    paths = [out / world.family / concept / MEMBRANE_FILE for concept in ("fox", "ghost")]
    assert result.stdout == "".join(f"{path}\n" for path in paths)
    assert [read_membrane(path).surrogate for path in paths] == ["", "a mouse"]
    for path in paths:
        assert json.loads(read_membrane(path).metadata["safegen.training"])["seed"] == 4
        assert "| moves the target's prediction | " in path.with_name("card.md").read_text("utf-8")
        grids = list((path.parent / "grids").iterdir())
        assert [grid.name for grid in grids] == ["step-00000002.png"]
    assert not (out / "checkpoints").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events")).Reload()
    tags: Any = events.Tags()
    assert set(tags["scalars"]) == {"erasing", "anchoring", "rate", "norm"}
    assert [event.step for event in events.Scalars("anchoring")] == [1, 2, 3]


def test_a_stopped_recipe_goes_on_from_its_checkpoint(
    run: Run, world: World, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = Trainer._iteration

    def stopping(self: Trainer, number: int, drawn: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return iterate(self, number, drawn)

    args = [str(recipe), "--model", world.pipeline, "--out", str(tmp_path / "out"), "--checkpoint-every", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_iteration", stopping)
        assert run("train", args).exit_code != 0
    result = run("train", args)
    assert result.exit_code == 0, result.stderr
    assert "going on from iteration 2" in result.stderr
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_dry_run_estimates_and_writes_nothing(run: Run, world: World, recipe: Path, tmp_path: Path) -> None:
    result = run("train", recipe, "--model", world.pipeline, "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "3 iterations of " in result.stdout
    assert "MiB beyond the model's" in result.stdout
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_another_family_is_refused(run: Run, recipe: Path, tmp_path: Path) -> None:
    result = run("train", recipe, "--model", "mini", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert "the recipe is for base family 'sd1', mini is 'mini'" in complaint(result)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["RECIPE", "--concept", "fox"], "--concept does not go with a recipe"),
        (["RECIPE", "--surrogate", "x"], "--surrogate does not go with a recipe"),
        (["--method", "paper", "--concept", "fox"], "--method is for recipes"),
        (["none.yaml"], "none.yaml: neither a file nor a shipped recipe"),
        (["RECIPE", "--rank", "0"], "--rank 0: "),
    ],
)
def test_what_does_not_go_with_a_recipe(
    run: Run, world: World, recipe: Path, tmp_path: Path, args: list[str], expected: str
) -> None:
    words = [str(recipe) if word == "RECIPE" else word for word in args]
    result = run("train", words, "--model", world.pipeline, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert expected in complaint(result)
    assert "loading" not in result.stderr
