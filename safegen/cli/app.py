"""The `safegen` command."""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer

from safegen._version import __version__
from safegen.cli import (
    audit,
    audit_export,
    audit_prune,
    audit_read,
    audit_verify,
    calibrate,
    convert,
    demo,
    diff,
    explain,
    faults,
    fmt,
    generate,
    init,
    inspect,
    lint,
    schema,
    test,
    train,
    validate,
)
from safegen.cli.faults import reported
from safegen.cli.render import show, warn

_EXIT_CODES = (
    "Exit codes: 0 fine; 1 findings (a prompt was refused, a rule at or above --fail-on was touched, a policy test "
    "failed, lint found something); 2 usage; "
    "3 invalid policy; 4 integrity (a damaged or foreign membrane, an unsupported pipeline, a log that was changed); "
    "5 internal.\n\n"
    "Example: safegen demo"
)

app = typer.Typer(
    name="safegen",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `reported` prints what went wrong
    context_settings={"help_option_names": ["-h", "--help"]},
)
_audit = typer.Typer()


class _ShownWarnings(logging.Handler):
    """Shows what the library logs for people, such as the notices of a policy, as the command line shows warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record to stderr."""
        warn(record.getMessage())


def _print_version(value: bool) -> None:
    if value:
        show(f"safegen {__version__}")
        raise typer.Exit


@app.callback(epilog=_EXIT_CODES)
def _root(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SAFEGEN_DEBUG", help="Print the traceback of what went wrong.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep image generators inside a content-safety policy: erase concepts, leave the rest alone, record it all."""
    faults.debug.set(debug)
    logger, handler = logging.getLogger("safegen"), _ShownWarnings(logging.WARNING)
    logger.addHandler(handler)
    ctx.call_on_close(lambda: logger.removeHandler(handler))


app.command("demo", epilog=demo.EXAMPLE)(reported()(demo.demo))
app.command("generate", epilog=generate.EXAMPLE)(reported()(generate.generate))
_audit.callback(invoke_without_command=True, epilog=audit.EXAMPLE)(reported()(audit.audit))
_audit.command("verify", epilog=audit_verify.EXAMPLE)(reported()(audit_verify.verify))
_audit.command("key", epilog=audit_verify.KEY_EXAMPLE)(reported()(audit_verify.key))
_audit.command("tail", epilog=audit_read.TAIL_EXAMPLE)(reported()(audit_read.tail))
_audit.command("show", epilog=audit_read.SHOW_EXAMPLE)(reported()(audit_read.show_record))
_audit.command("find", epilog=audit_read.FIND_EXAMPLE)(reported()(audit_read.find))
_audit.command("export", epilog=audit_export.EXAMPLE)(reported()(audit_export.export))
_audit.command("merge", epilog=audit_export.MERGE_EXAMPLE)(reported()(audit_export.merge))
_audit.command("prune", epilog=audit_prune.EXAMPLE)(reported()(audit_prune.prune))
app.add_typer(_audit, name="audit")
app.command("train", epilog=train.EXAMPLE)(reported()(train.train))
app.command("convert", epilog=convert.EXAMPLE)(reported()(convert.convert))
app.command("calibrate", epilog=calibrate.EXAMPLE)(reported()(calibrate.calibrate))
app.command("explain", epilog=explain.EXAMPLE)(reported()(explain.explain))
app.command("test", epilog=test.EXAMPLE)(reported()(test.run_tests))
app.command("lint", epilog=lint.EXAMPLE)(reported()(lint.lint))
app.command("inspect", epilog=inspect.EXAMPLE)(reported()(inspect.inspect))
app.command("init", epilog=init.EXAMPLE)(reported()(init.init))
app.command("validate", epilog=validate.EXAMPLE)(reported()(validate.validate))
app.command("fmt", epilog=fmt.EXAMPLE)(reported()(fmt.fmt))
app.command("diff", epilog=diff.EXAMPLE)(reported()(diff.diff))
app.command("schema", epilog=schema.EXAMPLE)(reported()(schema.schema))


def main() -> None:
    """Runs the command line; the console entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a prompt that the locale cannot show must not end a run
    app()
