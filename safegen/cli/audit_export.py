"""`safegen audit export` and `merge`: an audit log in other forms."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from safegen.cli import options
from safegen.cli.render import say
from safegen.errors import AuditChainError, UsageError

EXAMPLE = "Example: safegen audit export safegen-demo/audit --parquet audit.parquet"
MERGE_EXAMPLE = "Example: safegen audit merge safegen-demo/audit other/audit --out all.jsonl"


def export(
    log: options.OptionalLog = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="A Parquet file (extra: audit).")] = None,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="A CSV file; - for standard output.")] = None,
    otlp: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="An OpenTelemetry collector, such as http://localhost:4318/v1/traces (extra: otel)."
        ),
    ] = None,
) -> None:
    """Write an audit log as a table, or send it to a collector; in the order of time. Verify it first."""
    from safegen.audit.read import merged

    if sum(target is not None for target in (parquet, csv, otlp)) != 1:
        raise UsageError("expected exactly one of --parquet FILE, --csv FILE and --otlp URL")
    path = options.log_or_default(log)
    lines = merged([path])
    if parquet is not None:
        from safegen.audit.table import write_parquet

        with _whole(parquet) as draft:
            count = write_parquet(lines, draft)
    elif csv is not None:
        from safegen.audit.table import write_csv

        if csv == "-":
            count = write_csv(lines, sys.stdout)
        else:
            with _whole(Path(csv)) as draft, draft.open("w", encoding="utf-8", newline="") as file:
                count = write_csv(lines, file)
    else:
        from safegen.audit.otlp import exporter_to, send

        assert otlp is not None
        say(f"{send(lines, exporter_to(otlp))} spans sent")
        return
    say(f"{count} records written")


def merge(
    logs: Annotated[list[Path], typer.Argument(metavar="LOG…", help="Segments, or folders of logs.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the merged records go.")],
) -> None:
    """Join the records of several processes or machines in one file, in the order of time, each line as it was written.

    Every log is verified first. The merged file is for reading: the chains are those of the segments it came from.
    """
    from safegen.audit import verify
    from safegen.audit.read import merged

    for log in logs:
        report = verify(log)
        if not report.ok:
            raise AuditChainError(f"{log}: not as it was written: {report.faults[0]}", report.faults[0].seq)
    count = 0
    with _whole(out) as draft, draft.open("wb") as file:
        for line in merged(logs):
            file.write(line.data + b"\n")
            count += 1
    say(f"{count} records written")


@contextmanager
def _whole(path: Path) -> Generator[Path]:
    """Yields a file to write; `path` gets it once it is whole, and readable by this user alone."""
    with options.writing(path):
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        os.close(fd)
        try:
            yield Path(name)
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
