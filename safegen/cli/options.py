"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from safegen.errors import UsageError

MINI = "mini"

Model = Annotated[
    str,
    typer.Option("--model", help='The image model: "mini" (embedded), a diffusers pipeline folder, or a hub id.'),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Pinned commit of a hub id.")]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="Name of a shipped policy, or a path.",
        show_default="mini-strict for the model mini, else strict",
    ),
]
Membranes = Annotated[
    list[Path] | None,
    typer.Option(
        "--membranes",
        metavar="DIR",
        help="Further folder of membranes, laid out as train writes it; may be given several times.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value to stdout, and nothing else there.")]


def policy_for(policy: str | None, model: str) -> str:
    """Returns the policy to use: the one given, or the shipped one that fits the model."""
    return policy or ("mini-strict" if model == MINI else "strict")


def check_folder(path: Path) -> None:
    """Refuses an output folder that cannot be one, before any work is done for it.

    Raises:
        UsageError: Something else is in its place, or it could not be created.
    """
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"{path}: expected an output folder, but {place} is a file; choose another --out")
    if not os.access(place, os.W_OK):
        raise UsageError(f"{path}: {place} cannot be written to; choose another --out")
