"""Writing what `safegen train` made: the membrane, calibrated, and its card."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safegen.cli import options
from safegen.errors import UsageError

if TYPE_CHECKING:
    from safegen.backend import Backend
    from safegen.membrane.weights import Membrane
    from safegen.training.config import TrainConfig


def write_trained(
    backend: Backend, membrane: Membrane, config: TrainConfig, path: Path, captions: Path | None, model: str
) -> None:
    """Writes a membrane, calibrates it on this model's text encoder, and writes it again, with its card.

    Args:
        backend: The host.
        membrane: What was trained.
        config: Its settings.
        path: The membrane's file.
        captions: File of captions that must not open it; None for the default ones.
        model: "mini", a pipeline folder, or a hub id.

    Raises:
        UsageError: Something could not be written; the message says where the membrane is instead.
    """
    from safegen.cli.calibrate import measure
    from safegen.transport.calibration import METADATA_KEY, text_of

    _write(membrane, path)  # first, so that whatever goes wrong from here on costs no training
    found = text_of(measure(backend, membrane, captions, model))
    membrane = replace(membrane, metadata={**membrane.metadata, METADATA_KEY: found})
    digest = _write(membrane, path)
    with options.writing(path.with_name("card.md")):
        path.with_name("card.md").write_text(card_text(membrane, config, digest), "utf-8")


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

    settings = config.shared().model_dump(mode="json")
    return _CARD.format(
        concept=membrane.concept,
        base=membrane.base,
        version=__version__,
        targets=listed(membrane.targets),
        surrogate=membrane.surrogate or "nothing (what remains of the prompt)",
        neighbours=listed(config.neighbours) or "nobody named any",
        architecture=membrane.architecture,
        sites=len(membrane.factors),
        parameters=membrane.parameter_count(),
        effect=membrane.metadata["safegen.training_effect"],
        calibration=section(parse(membrane.metadata)),
        sha256=sha256,
        digest=config.digest(),
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        templates="\n".join(f'- "{prompt}", without the name "{rest}"' for prompt, rest in config.templates),
    )


def listed(names: Sequence[str]) -> str:
    """Returns names in quotes, with commas."""
    return ", ".join(f'"{name}"' for name in names)


_CARD = """# Membrane: {concept} on {base}

Made by `safegen train` {version}. **No figures were measured by this command**: how well it erases, and what it does to
other images, is unknown until somebody measures it.

| | |
|---|---|
| erases | {targets} |
| turns it into | {surrogate} |
| look-alikes held in place | {neighbours} |
| base family | {base} |
| architecture | `{architecture}` |
| sites, parameters | {sites}, {parameters:,} |
| moves the target's prediction | {effect} of what was asked for, on the last trajectories |
| sha256 of the file | `{sha256}` |
| training digest | `{digest}` |

## Settings

| setting | value |
|---|---|
{settings}

Prompts around the name:

{templates}

{calibration}"""
