"""`safegen audit tail`, `show` and `find`: looks into an audit log."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli import options
from safegen.cli.render import json_text, say, show, show_json, write
from safegen.errors import UsageError

if TYPE_CHECKING:
    from safegen.audit.read import Line

TAIL_EXAMPLE = "Example: safegen audit tail safegen-demo/audit -n 20"
SHOW_EXAMPLE = "Example: safegen audit show 0194f3c2 safegen-demo/audit"
FIND_EXAMPLE = 'Example: safegen audit find --prompt "a ghost" safegen-demo/audit'
_PAUSE = 0.5  # seconds between two looks
_SHORTEST = 8  # characters of an identifier


def tail(
    log: options.OptionalLog = None,
    count: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many records.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more, until interrupted.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the last records of an audit log, of all its processes, in the order of time."""
    from safegen.audit.read import Follower, last_lines

    path = options.log_or_default(log)
    if not follow:
        _print(last_lines(path, count), as_json=as_json)
        return
    follower = Follower(path)
    lines = last_lines(path, count)
    while True:
        for line in lines:
            write(json_text(line.values) + "\n") if as_json else show(_summary(line.values))
        sys.stdout.flush()
        time.sleep(_PAUSE)
        lines = follower.added()


def show_record(
    identifier: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="An event, a request, a record's hash or the sha256 of an image's RGB bytes; 8 characters are enough.",
        ),
    ],
    log: options.OptionalLog = None,
    as_json: options.AsJson = False,
) -> None:
    """Show every record of an event, a request or an image, in full."""
    from safegen.audit.read import matching

    if len(identifier) < _SHORTEST:
        raise UsageError(f"expected at least {_SHORTEST} characters of an identifier, found {len(identifier)}")
    path = options.log_or_default(log)
    lines = list(matching(path, identifier))
    if as_json:
        show_json({"records": [line.values for line in lines]})
    else:
        for line in lines:
            show(f"{line.file}:{line.values.get('seq', -1) + 1}")
            show(json.dumps(line.values, indent=2, ensure_ascii=True))
    if not lines:
        raise UsageError(f"{path}: no record of {identifier!r}; `safegen audit tail` shows what is there")


def find(
    prompt: Annotated[str, typer.Option(help="The prompt to look for; - reads it from standard input.")],
    log: options.OptionalLog = None,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A key of prompt digests, such as one in use before; several times if needed."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Find where a prompt, or negative prompt, appears in an audit log, by its keyed digest."""
    from safegen.audit import load_key
    from safegen.audit.read import of_prompt

    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    keys = [load_key(path) for path in key] if key else [load_key()]
    lines = list(of_prompt(options.log_or_default(log), [one.hmac(text) for one in keys]))
    _print(lines, as_json=as_json)
    if not as_json:
        say(f"{len(lines)} record{'s' if len(lines) != 1 else ''} (key {', '.join(one.key_id for one in keys)})")


def _print(lines: Iterable[Line], *, as_json: bool) -> None:
    if as_json:
        show_json({"records": [line.values for line in lines]})
    else:
        for line in lines:
            show(_summary(line.values))


def _summary(record: dict[str, Any]) -> str:
    """Returns a record as one line: when, what, which, and what was found and done."""
    parts = [record["ts"], f"{record['kind']:<14}", record["event_id"]]
    verdict, action, error = (record.get(name) or {} for name in ("verdict", "action", "error"))
    if verdict:
        parts.append(f"{verdict.get('rule') or '-'} {verdict.get('decision')}")
    if action:
        parts.append(
            f"{action.get('type')}{'' if action.get('enforced') else ' (would ' + str(action.get('would')) + ')'}"
        )
    parts += [
        f"{item.get('concept')} {item['permeability']:.2f}"
        + (f" effect {item['effect']:.3f}" if item.get("effect") is not None else "")
        for item in record.get("membranes") or ()
        if item.get("permeability")
    ]
    if error:
        parts.append(str(error.get("code")))
    if output := record.get("output"):
        parts.append(" ".join(digest[:12] for digest in output.get("sha256", ())))
    return "  ".join(parts)
