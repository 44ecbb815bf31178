"""`safegen calibrate`: measures from which score on a membrane opens, and writes that into its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli import options
from safegen.cli.render import Column, Line, Sheet, progress, say, show_json

if TYPE_CHECKING:
    from safegen.backend.base import Backend
    from safegen.membrane.weights import Membrane
    from safegen.transport.calibration import Calibration
    from safegen.transport.sentence import SentenceEncoder

EXAMPLE = (
    "Examples: safegen calibrate my-membranes/mini/snowman\n\n"
    "safegen calibrate van-gogh.safetensors --model ./my-pipeline --captions captions.txt"
)

_COLUMNS = (
    Column("membrane", share=2),
    Column("score", width=9),
    Column("lo", width=7),
    Column("hi", width=7),
    Column("AUROC", width=7),
    Column("false@99", width=8),
    Column("prompts", width=11),
)

Membranes = Annotated[
    list[Path], typer.Argument(metavar="MEMBRANE...", help="Membrane files, or the folders that hold them.")
]
Captions = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Captions that must not open it (.txt, .csv, .jsonl).",
        show_default=options.CAPTIONS_BY_DEFAULT,
    ),
]
Sentence = Annotated[
    str | None,
    typer.Option("--sentence-encoder", help="Calibrate the score semantic too: a model folder, or owner/name@commit."),
]


def calibrate(
    membranes: Membranes,
    model: options.Model = options.MINI,
    revision: options.Revision = None,
    captions: Captions = None,
    sentence_encoder: Sentence = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the thresholds of membranes on a model's text encoder, and write them into the files and their cards.

    The tensors stay as they are, bit for bit. What was measured on other encoders stays too.
    """
    from safegen.bundle.store import MEMBRANE_FILE
    from safegen.membrane.file import read_membrane

    paths = [path / MEMBRANE_FILE if path.is_dir() else path for path in membranes]
    contents = [read_membrane(path) for path in paths]  # for their faults, before the model is loaded

    from safegen.cli.host import load_host

    pipe = load_host(model, revision)

    from safegen.backend import backend_of
    from safegen.backend.sites import plan
    from safegen.transport.sentence import SentenceEncoder

    backend = backend_of(pipe)
    for content in contents:
        plan(content, backend.sites, backend.family)  # refuses a membrane of another base model
    sentence = SentenceEncoder(sentence_encoder) if sentence_encoder else None
    found: list[dict[str, Any]] = []
    for path, content in zip(paths, contents, strict=True):
        measured = measure(backend, content, captions, model, sentence)
        found.append({"file": str(path), "concept": content.concept, **_write(path, content, measured)})
    if as_json:
        show_json(found)
        return
    Sheet(_COLUMNS).add(_line(one["concept"], c) for one in found for c in one["calibration"])
    for one in found:
        say(f"written: {one['file']} (sha256 {one['sha256'][:16]}…)")


def measure(
    backend: Backend, membrane: Membrane, captions: Path | None, model: str, sentence: SentenceEncoder | None = None
) -> tuple[Calibration, ...]:
    """Calibrates one membrane on prompts made from its names.

    Args:
        backend: The host.
        membrane: The membrane.
        captions: File of captions that must not open it; None for the default ones.
        model: "mini", a pipeline folder, or a hub id: what the prompts must fit.
        sentence: Sentence encoder to calibrate `semantic` with too.

    Raises:
        UsageError: No captions that leave its names out.
        PromptsFileError: The captions cannot be read.
    """
    from safegen.cli.train_plan import calibration_prompts
    from safegen.transport.calibrate import calibrate as calibrated

    prompts = calibration_prompts(membrane.concept, membrane.targets, captions, model)
    with progress(f"calibrating {membrane.concept}", sum(map(len, prompts))) as step:
        return calibrated(
            backend,
            membrane.targets,
            prompts.positives,
            prompts.negatives,
            neighbours=prompts.neighbours,
            sentence=sentence,
            report=lambda done: step(done, ""),
        )


def _write(path: Path, membrane: Membrane, measured: Sequence[Calibration]) -> dict[str, Any]:
    from dataclasses import asdict

    from safegen.membrane.calibrated import write_calibration
    from safegen.transport.calibration import merged, parse, section, text_of

    every = merged(parse(membrane.metadata), measured)
    digest = write_calibration(path, text_of(every), section(every))
    return {"sha256": digest, "calibration": [asdict(one) for one in measured]}


def _line(concept: str, values: dict[str, Any]) -> Line:
    numbers = (f"{values['lo']:.4f}", f"{values['hi']:.4f}", f"{values['auroc']:.4f}")
    counts = f"{values['positives']}, {values['negatives']}"
    return Line((concept, values["score"], *numbers, f"{values['false_open_at_99']:.2%}", counts))
