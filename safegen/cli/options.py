"""Options that several commands share."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from safegen.errors import UsageError

MINI = "mini"
CAPTIONS_BY_DEFAULT = "the model mini's own captions, else the names of the catalogue's other concepts"

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
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="FAMILY|DIR",
        help="The model that the file was made for, to find its sites: sd1, sd2, sdxl, mini, or a pipeline folder.",
    ),
]
Context = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        metavar="KEY=VALUE",
        help="What is known of the caller, such as tenant=acme or task=img2img, for exceptions and applies_to; may be "
        "given several times.",
    ),
]
Log = Annotated[Path, typer.Argument(metavar="LOG", help="A segment file, or the folder of a log.")]
OptionalLog = Annotated[
    Path | None,
    typer.Argument(metavar="[LOG]", help="A segment file, or the folder of a log.", show_default="the default folder"),
]
SigningKey = Annotated[
    Path | None,
    typer.Option("--signing-key", metavar="FILE", help="The private key.", show_default="this machine's"),
]
HmacKeyFile = Annotated[
    Path | None,
    typer.Option("--hmac-key", metavar="FILE", help="The key of prompt digests.", show_default="this machine's"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value to stdout, and nothing else there.")]

Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Also write a JUnit report (XML).")]
Sarif = Annotated[Path | None, typer.Option("--sarif", metavar="FILE", help="Also write a SARIF log (JSON).")]


def policy_for(policy: str | None, model: str) -> str:
    """Returns the policy to use: the one given, or the shipped one that fits the model."""
    return policy or ("mini-strict" if model == MINI else "strict")


def context_of(given: Sequence[str] | None) -> dict[str, str]:
    """Reads the values of `--context`.

    Raises:
        UsageError: One is not KEY=VALUE, or names a key twice, or is none that a context may hold.
    """
    from safegen.policy.context import checked

    context: dict[str, str] = {}
    for item in given or ():
        key, sign, value = item.partition("=")
        if not sign or not value or key in context:
            what = "a key that was given before" if key in context else "something else"
            raise UsageError(f"--context {item}: expected KEY=VALUE (like tenant=acme), found {what}")
        context[key] = value
    return dict(checked(context))


def log_or_default(log: Path | None) -> Path:
    """Returns the log to read: the one given, or the folder that audits go to by default."""
    from safegen.audit.options import default_directory

    return log or default_directory()


def check_folder(path: Path) -> None:
    """Refuses an output folder that cannot be written, before any work is done for it; leaves nothing behind.

    Asking for permissions is not enough (root passes on read-only and virtual file systems), so a file is written.

    Raises:
        UsageError: Something else is in its place, it could not be created, or no file can be written there.
    """
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"{path}: expected an output folder, but {place} is a file; choose another place")
    folder, made = path.absolute(), list[Path]()
    try:
        for part in (*reversed(folder.parents), folder):
            if not part.is_dir():
                part.mkdir()
                made.append(part)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"safegen")
    except OSError as error:
        raise _unwritable(path, "expected an output folder that can be written to", error) from error
    finally:
        for part in reversed(made):
            with suppress(OSError):  # somebody else has put something there meanwhile
                part.rmdir()


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turns what goes wrong while `path` is written (a full disk, say) into a message that says where and what to do.

    Raises:
        UsageError: The file could not be written.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(path, "could not be written", error) from error


def _unwritable(path: Path, what: str, error: OSError) -> UsageError:
    return UsageError(f"{path}: {what}: {error.strerror or error}; make room or choose another place, and run again")
