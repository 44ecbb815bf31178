"""`safegen train`: trains the membrane of one concept."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli import options
from safegen.cli.render import progress, say, show
from safegen.cli.train_plan import plan_for
from safegen.errors import UsageError
from safegen.mini.zoo import Plan

if TYPE_CHECKING:
    from safegen.backend import Backend
    from safegen.membrane.weights import Membrane
    from safegen.training.config import TrainConfig

EXAMPLE = (
    "Examples: safegen train --concept snowman --out my-membranes\n\n"
    "safegen train --concept van-gogh --model ./my-pipeline --pool captions.txt --iterations 1000"
)


class Anchors(StrEnum):
    """The choices of `TrainConfig.anchors`, which is not imported here so that `--help` stays quick."""

    PAPER = "paper"
    NEIGHBOURS = "neighbours"


Concept = Annotated[str, typer.Option(help="Concept id of the catalogue: what is erased.")]
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
    typer.Option(help="Captions to hold in place: far ones (SPM Eq. 6) or near ones.", show_default="neighbours"),
]
Rank = Annotated[int | None, typer.Option(help="Rank of the membrane.", show_default="1")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate.", show_default="0.01")]
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
    concept: Concept,
    target: Target = None,
    model: options.Model = options.MINI,
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
) -> None:
    """Train the membrane of one concept, and write it with a card so that --membranes OUT finds it.

    Prints the path of the membrane. How well it erases, and what else it touches, is not measured here.
    """
    options.check_folder(out)
    plan = plan_for(concept, target or (), pool, model)
    config = _config(
        plan,
        surrogate=surrogate,
        iterations=iterations,
        eta=eta,
        anchoring=anchoring,
        anchors=anchors.value if anchors else None,
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
    )
    path = _train_and_write(model, revision, config, plan, out, pool)
    show(str(path))
    say(f"use it: safegen generate … --membranes {out} (with a policy that has a rule for {concept!r})")


def _train_and_write(
    model: str, revision: str | None, config: TrainConfig, plan: Plan, out: Path, pool: Path | None
) -> Path:
    from safegen.cli.host import load_host

    pipe = load_host(model, revision)

    from safegen.backend import backend_of
    from safegen.bundle.store import MEMBRANE_FILE

    backend = backend_of(pipe)
    path = out / backend.family / plan.concept / MEMBRANE_FILE
    if path.exists():
        raise UsageError(f"{path}: a membrane is there already; choose another --out, or move it away")
    options.check_folder(path.parent)
    held = f"holds {len(plan.pool)} captions in place"
    say(f"training {plan.concept!r} on {model}: erases {_listed(plan.targets)}, {held}")
    membrane = _trained(pipe, backend, config, plan)
    _write(membrane, path)  # first, so that whatever goes wrong from here on costs no training
    membrane = _calibrated(backend, membrane, pool, model)
    digest = _write(membrane, path)
    with options.writing(path.with_name("card.md")):
        path.with_name("card.md").write_text(card_text(membrane, config, digest), "utf-8")
    return path


def _config(plan: Plan, **given: Any) -> TrainConfig:
    """Returns the settings; those that are None keep their default.

    Raises:
        UsageError: A value out of bounds; all of them at once.
    """
    from pydantic import ValidationError

    from safegen.training.config import TrainConfig

    chosen = {key: value for key, value in given.items() if value is not None}
    try:
        return TrainConfig(concept=plan.concept, targets=plan.targets, templates=plan.templates, **chosen)
    except ValidationError as error:
        faults = [
            f"--{str(fault['loc'][0]).replace('_', '-')} {fault['input']!r}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        ]
        raise UsageError("; ".join(faults)) from error


def _trained(pipe: Any, backend: Backend, config: TrainConfig, plan: Plan) -> Membrane:
    from safegen.training.recipe import Progress, Trainer

    trainer = Trainer(backend, config, plan.pool, pipe.scheduler)
    with progress("training", config.iterations, lines=True) as step:

        def report(now: Progress) -> None:
            step(now.iteration, f"erasing {now.erasing:.3g}  anchoring {now.anchoring:.3g}")

        return trainer.run(report)


def _calibrated(backend: Backend, membrane: Membrane, captions: Path | None, model: str) -> Membrane:
    """Returns the membrane with the thresholds that hold on this model's text encoder."""
    from safegen.cli.calibrate import measure
    from safegen.transport.calibration import METADATA_KEY, text_of

    found = text_of(measure(backend, membrane, captions, model))
    return replace(membrane, metadata={**membrane.metadata, METADATA_KEY: found})


def _write(membrane: Membrane, path: Path) -> str:
    """Writes a membrane; where that fails, into the folder for temporary files, so that no training is lost.

    Returns:
        The sha256 of the file, in hex.

    Raises:
        UsageError: The file could not be written; the message says where the membrane is instead.
    """
    from safegen.membrane.file import write_membrane

    try:
        with options.writing(path):
            return write_membrane(membrane, path)
    except UsageError as error:
        rescued = Path(tempfile.mkdtemp(prefix="safegen-train-")) / path.name
        with options.writing(rescued):
            write_membrane(membrane, rescued)
        raise UsageError(f"{error} (not to train again: the membrane was written to {rescued}; move it)") from error


def card_text(membrane: Membrane, config: TrainConfig, sha256: str) -> str:
    """Returns the card of a membrane that `safegen train` made."""
    from safegen._version import __version__
    from safegen.transport.calibration import parse, section

    settings = config.model_dump(mode="json", exclude={"concept", "targets", "templates"})
    return _CARD.format(
        concept=membrane.concept,
        base=membrane.base,
        version=__version__,
        targets=_listed(membrane.targets),
        surrogate=membrane.surrogate or "nothing (the unconditional prediction)",
        architecture=membrane.architecture,
        sites=len(membrane.factors),
        parameters=membrane.parameter_count(),
        calibration=section(parse(membrane.metadata)),
        sha256=sha256,
        digest=config.digest(),
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items() if key != "surrogate"),
        templates="\n".join(f'- "{prompt}", without the name "{rest}"' for prompt, rest in config.templates),
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


_CARD = """# Membrane: {concept} on {base}

Made by `safegen train` {version}. **No figures were measured by this command**: how well it erases, and what it does to
other images, is unknown until somebody measures it.

| | |
|---|---|
| erases | {targets} |
| turns it into | {surrogate} |
| base family | {base} |
| architecture | `{architecture}` |
| sites, parameters | {sites}, {parameters:,} |
| sha256 of the file | `{sha256}` |
| training digest | `{digest}` |

## Settings

| setting | value |
|---|---|
{settings}

Prompts around the name:

{templates}

{calibration}"""
