"""`safegen fmt`: one layout for policy files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from safegen.cli import options
from safegen.cli.render import say, show
from safegen.errors import PolicyNotFoundError

EXAMPLE = "Examples: safegen fmt my-policy.yaml\n\nsafegen fmt --check policies/"
UNFORMATTED = 1  # exit code

Files = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", help="Policy, concept or test files, or folders, whose *.yaml files are taken."),
]
Check = Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if a file is laid out otherwise.")]


def fmt(files: Files, check: Check = False) -> None:
    """Lay out policy files anew: indentation, spaces, line ends. Comments, order, quotes and numbers stay.

    What a file says, and so the digest of the policy, does not change; a file that is not YAML is refused.
    """
    from safegen.policy.document import read_text
    from safegen.policy.format import formatted

    paths = [path for given in files for path in _files(given)]
    texts = [(path, read_text(path)) for path in paths]
    laid_out = [(path, text, formatted(text, str(path))) for path, text in texts]  # all, before one is written
    changed = [(path, after) for path, before, after in laid_out if after != before]
    for path, after in changed:
        show(str(path))
        if not check:
            _write(path, after)
    say(f"{len(changed)} of {len(paths)} files {'would be laid out anew' if check else 'laid out anew'}")
    if check and changed:
        raise typer.Exit(UNFORMATTED)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob("*.yaml"))
    if not found:
        raise PolicyNotFoundError(f"{path}: expected *.yaml files in this folder, found none; name a file")
    return found


def _write(path: Path, text: str) -> None:
    """Replaces a file in one step, so that nothing is lost where the disk is full; a link stays a link."""
    path = path.resolve()
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with options.writing(path):
        try:
            draft.write_text(text, encoding="utf-8", newline="\n")
            draft.chmod(path.stat().st_mode)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
