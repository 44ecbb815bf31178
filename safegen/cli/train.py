"""`safegen train`: trains the membranes of a recipe, or of one concept."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli import options
from safegen.cli.render import say, show
from safegen.cli.train_write import listed
from safegen.errors import BaseModelMismatchError, UsageError

if TYPE_CHECKING:
    from safegen.backend import Backend
    from safegen.cli.train_run import Run
    from safegen.cli.train_watch import Watching
    from safegen.training.recipe import Trainer

EXAMPLE = (
    "Examples: safegen train --concept snowman --out my-membranes\n\n"
    "safegen train sd1/van-gogh --model ./my-pipeline --dry-run\n\n"
    "safegen train --concept van-gogh --model ./my-pipeline --pool captions.txt --iterations 1000"
)


class Anchors(StrEnum):
    """The choices of `TrainConfig.anchors`, which is not imported here so that `--help` stays quick."""

    REFERENCE = "reference"
    PAPER = "paper"
    NEIGHBOURS = "neighbours"


class Method(StrEnum):
    """The choices of a recipe's `method`, for the same reason."""

    OURS = "ours"
    PAPER = "paper"


RecipeName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="Recipe that says what to erase and how: a file, or a shipped one (sd1/van-gogh).",
        show_default=False,
    ),
]
Concept = Annotated[
    str | None, typer.Option(help="Concept id of the catalogue: what is erased, where no recipe says it.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help='"mini" (embedded), a diffusers pipeline folder, or a hub id.', show_default="the recipe's, else mini"
    ),
]
Target = Annotated[
    list[str] | None,
    typer.Option(help="Name to erase; may be given several times.", show_default="the concept's name and aliases"),
]
Out = Annotated[Path, typer.Option(help="Folder of membranes; this one goes to OUT/<family>/<concept>/.")]
Surrogate = Annotated[
    str | None, typer.Option(help="What the concept turns into.", show_default="nothing: it is left out")
]
Iterations = Annotated[int | None, typer.Option(help="Training steps.", show_default="200")]
Eta = Annotated[float | None, typer.Option(help="How hard to erase: eta of SPM Eq. 4.", show_default="1.0")]
Anchoring = Annotated[
    float | None, typer.Option(help="How hard to hold the rest in place: lambda of SPM Eq. 8.", show_default="10.0")
]
AnchorChoice = Annotated[
    Anchors | None,
    typer.Option(
        help="Captions to hold in place: near ones, far ones (SPM Eq. 6), or noise as released.",
        show_default="neighbours",
    ),
]
Rank = Annotated[int | None, typer.Option(help="Rank of the membrane.", show_default="1")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate.", show_default="0.01")]
MethodChoice = Annotated[
    Method | None, typer.Option("--method", help="Whose settings of a recipe.", show_default="the recipe's")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what time and memory it would take; train nothing.")]
CheckpointEvery = Annotated[
    int, typer.Option(min=0, help="Iterations between checkpoints, from which a stopped run goes on; 0: none.")
]
GridEvery = Annotated[int, typer.Option(min=0, help="Iterations between grids of pictures, before and after; 0: none.")]
TensorBoard = Annotated[Path | None, typer.Option(metavar="DIR", help="Write events for TensorBoard.")]
Device = Annotated[
    str | None, typer.Option(help="Where to train: cpu, cuda, …", show_default="accelerate's, else the CPU")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the training.", show_default="0")]
Pool = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Captions of what must stay as it is (.txt, .csv, .jsonl).",
        show_default=options.CAPTIONS_BY_DEFAULT,
    ),
]


def train(
    recipe: RecipeName = None,
    concept: Concept = None,
    target: Target = None,
    model: Model = None,
    revision: options.Revision = None,
    out: Out = Path("safegen-membranes"),
    surrogate: Surrogate = None,
    iterations: Iterations = None,
    eta: Eta = None,
    anchoring: Anchoring = None,
    anchors: AnchorChoice = None,
    rank: Rank = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    pool: Pool = None,
    method: MethodChoice = None,
    dry_run: DryRun = False,
    checkpoint_every: CheckpointEvery = 100,
    grid_every: GridEvery = 0,
    tensorboard: TensorBoard = None,
    device: Device = None,
) -> None:
    """Train membranes, and write them with their cards so that --membranes OUT finds them.

    Prints the path of each. How well it erases, and what else it touches, is not measured here. A run that was stopped
    goes on from its last checkpoint when it is started again.
    """
    options.check_folder(out)
    given: dict[str, Any] = dict(
        iterations=iterations, eta=eta, anchoring=anchoring, anchors=anchors.value if anchors else None, rank=rank,
        learning_rate=learning_rate, seed=seed,
    )  # fmt: skip
    from safegen.cli.train_run import run_of_options, run_of_recipe

    if recipe is not None:
        stated = {"--concept": concept, "--target": target, "--surrogate": surrogate, "--pool": pool}
        for name in [name for name, value in stated.items() if value is not None]:
            raise UsageError(f"{name} does not go with a recipe; say it in {recipe}")
        run = run_of_recipe(recipe, method.value if method else None, model, revision, given)
    elif concept is None or method is not None:
        raise UsageError("give a recipe, or --concept ID (--method is for recipes): safegen train --help has examples")
    else:
        run = run_of_options(concept, target or (), pool, model or options.MINI, revision, surrogate, given)
    from safegen.cli.train_watch import Watching

    _Training(run, device).go(out, dry_run, checkpoint_every, Watching(out, grid_every, tensorboard))


class _Training:
    """One run on its host; of several processes, the first one says and writes."""

    def __init__(self, run: Run, device: str | None) -> None:
        from safegen.cli.host import load_host

        self.run, self.pipe = run, load_host(run.model, run.revision)

        from safegen.backend import backend_of
        from safegen.training.workers import Workers

        self.workers = Workers.joined()
        place = device or self.workers.device
        if place is not None:
            self.pipe.to(place)
        self.backend: Backend = backend_of(self.pipe)
        if run.family not in (None, self.backend.family) and not self.backend.family.startswith("sd-"):
            raise BaseModelMismatchError(
                f"the recipe is for base family {run.family!r}, {run.model} is {self.backend.family!r}; give a model "
                "of the recipe's family, or take the recipe of this one"
            )

    def go(self, out: Path, dry_run: bool, checkpoint_every: int, asked: Watching) -> None:
        """Trains and writes, or says what that would take."""
        from safegen.bundle.store import MEMBRANE_FILE
        from safegen.training.recipe import Trainer

        first = self.workers.rank == 0
        folder = out / self.backend.family
        paths = [folder / config.concept / MEMBRANE_FILE for config in self.run.configs]
        for path in paths:
            if path.exists() and not dry_run:
                raise UsageError(f"{path}: a membrane is there already; choose another --out, or move it away")
            options.check_folder(path.parent)
        names = ", ".join(f"{c.concept!r} ({listed(c.targets)})" for c in self.run.configs)
        if first:
            say(f"training on {self.run.model}: erases {names}, holds {len(self.run.pool)} captions in place")
        trainer = Trainer(self.backend, self.run.configs, self.run.pool, self.pipe.scheduler, workers=self.workers)
        if dry_run:
            _show_estimate(trainer)
            return
        self._train(trainer, paths, out, checkpoint_every, replace(asked, folder=folder))

    def _train(self, trainer: Trainer, paths: list[Path], out: Path, every: int, asked: Watching) -> None:
        from safegen.cli.train_watch import watching
        from safegen.cli.train_write import write_trained
        from safegen.training.checkpoint import Checkpoints

        checkpoints = Checkpoints(out / "checkpoints" / trainer.digest[:16], every) if every else None
        if self.workers.rank > 0:
            trainer.run_all(checkpoints=checkpoints)
            return
        if checkpoints is not None and checkpoints.latest:
            say(f"going on from iteration {checkpoints.latest} ({checkpoints.folder})")
        with watching(self.pipe, trainer, self.run, asked) as report:
            membranes = trainer.run_all(report, checkpoints)
        self.pipe.to("cpu")
        for membrane, config, path in zip(membranes, self.run.configs, paths, strict=True):
            write_trained(self.backend, membrane, config, path, self.run.captions, self.run.model)
            show(str(path))
        if checkpoints is not None:
            checkpoints.clear()
        concepts = listed([config.concept for config in self.run.configs])
        say(f"use it: safegen generate … --membranes {out} (with a policy that has a rule for {concepts})")


def _show_estimate(trainer: Trainer) -> None:
    from safegen.training.estimate import estimate

    found = estimate(trainer)
    size = trainer.student.bytes()
    show(f"time      {found.total:.0f} s: {trainer.config.iterations} iterations of {found.iteration:.2f} s, and")
    show(f"          {found.drawing:.2f} s for each set of trajectories")
    show(
        f"memory    {found.peak / 2**20:.0f} MiB beyond the model's {size / 2**20:.0f} MiB, on {trainer.student.device}"
    )
