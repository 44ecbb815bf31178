"""`safegen audit verify`: checks an audit log."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from safegen.cli import options
from safegen.cli.render import show, show_json
from safegen.errors import AuditChainError

EXAMPLE = "Example: safegen audit verify safegen-demo/audit"


def verify(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="A segment file, or the folder of a log.")],
    as_json: options.AsJson = False,
) -> None:
    """Check an audit log: exit code 0 if no record was changed, removed or moved, 4 otherwise."""
    from safegen.audit import verify as verify_log

    report = verify_log(log)
    if as_json:
        show_json({"ok": report.ok, **asdict(report)})
    else:
        show(str(report))
    if not report.ok:
        more = f" (and {report.fault_count - 1} more)" if report.fault_count > 1 else ""
        raise AuditChainError(f"{log}: not as it was written: {report.faults[0]}{more}", report.faults[0].seq)
