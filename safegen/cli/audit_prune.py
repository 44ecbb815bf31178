"""`safegen audit prune`: removes old segments of an audit log."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from safegen.cli import options
from safegen.cli.render import say, show, show_json, warn

EXAMPLE = "Example: safegen audit prune safegen-demo/audit --older-than 185"
_DEFAULT = 185  # days; `safegen.audit.prune.MIN_RETENTION_DAYS`, which is not imported here so that --help stays quick


def prune(
    log: options.Log,
    older_than: Annotated[
        int, typer.Option("--older-than", metavar="DAYS", min=0, help="Remove segments whose last record is older.")
    ] = _DEFAULT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    signing_key: options.SigningKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove old segments, with a signed tombstone for each, so that the rest of the log still verifies."""
    from safegen.audit import load_signer
    from safegen.audit.prune import MIN_RETENTION_DAYS
    from safegen.audit.prune import prune as prune_log

    if older_than < MIN_RETENTION_DAYS:
        warn(f"laws may ask for records of at least six months; {older_than} days are fewer than {MIN_RETENTION_DAYS}")
    before = datetime.now(UTC) - timedelta(days=older_than)
    pruned = prune_log(log, before, load_signer(signing_key), dry_run=dry_run)
    if as_json:
        show_json({"dry_run": dry_run, **asdict(pruned)})
        return
    for name in pruned.segments:
        show(name)
    verb = "would be removed" if dry_run else "removed"
    say(f"{len(pruned.segments)} segments with {pruned.records} records {verb}")
    for name in pruned.in_use:
        say(f"kept, a process writes it still: {name}")
