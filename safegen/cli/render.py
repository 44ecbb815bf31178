"""What the command line shows: the only module here that imports rich.

Everything shown may come from a file that a stranger wrote, so control and formatting characters are spelled out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_WIDTH_OFF_TERMINAL = 140


def _console(*, error: bool = False) -> Console:
    stream = sys.stderr if error else sys.stdout
    free = not stream.isatty() and "COLUMNS" not in os.environ
    width = _WIDTH_OFF_TERMINAL if free else None
    return Console(stderr=error, width=width, highlight=False, markup=False, emoji=False)


def plain(text: str) -> str:
    """Returns `text` with every character that does not print (escapes, direction marks) spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _print(text: str, *, error: bool, lead: str = "", style: str = "") -> None:
    console = _console(error=error)
    for number, line in enumerate(text.splitlines() or [""]):
        shown = Text.assemble((lead if number == 0 else "", style), plain(line))
        console.print(shown, soft_wrap=True)


def show(text: str) -> None:
    """Prints lines of data to stdout."""
    _print(text, error=False)


def show_facts(facts: Mapping[str, object]) -> None:
    """Prints named values to stdout, one a line; a list as its items, a mapping as its pairs, nothing as "-"."""
    for name, value in facts.items():
        items: Sequence[object] = value if isinstance(value, list) else [value]
        show(f"{name.replace('_', ' '):<16} {', '.join(_fact(item) for item in items) or '-'}")


def _fact(value: object) -> str:
    if isinstance(value, dict):
        pairs = cast("dict[str, object]", value)
        return " ".join(f"{name} {part}" for name, part in pairs.items())
    return str(value)


def say(text: str) -> None:
    """Prints a message to stderr."""
    _print(text, error=True)


def warn(text: str) -> None:
    """Prints a warning to stderr."""
    _print(text, error=True, lead="warning: ", style="bold yellow")


def fail(text: str) -> None:
    """Prints an error to stderr."""
    _print(text, error=True, lead="error: ", style="bold red")


def show_traceback(text: str) -> None:
    """Prints a formatted traceback to stderr."""
    _print(text.rstrip("\n"), error=True)


def json_text(value: object) -> str:
    """Returns JSON in ASCII, so that no terminal or locale can break it."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def show_json(value: object) -> None:
    """Prints one JSON value to stdout."""
    write(json.dumps(value, ensure_ascii=True, allow_nan=False, indent=1) + "\n")


def write(text: str) -> None:
    """Writes text to stdout as it is."""
    sys.stdout.write(text)


def show_weighed(text: str, places: Sequence[tuple[int, int, float]]) -> None:
    """Prints a text to stdout, its parts coloured by their weights.

    Args:
        text: Any text.
        places: Start, end and weight in [0, 1] of parts that do not overlap, in order.
    """
    shown = Text()
    done = 0
    for start, end, weight in places:
        shown.append(plain(text[done:start]))
        shade = int(255 * (1 - weight))
        shown.append(plain(text[start:end]), style=f"bold rgb(255,{shade},{shade})" if weight > 0 else "")
        done = end
    shown.append(plain(text[done:]))
    _console().print(shown, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a sheet: a fixed `width`, or a `share` of the width that is left."""

    title: str
    width: int | None = None
    share: int | None = None

    @property
    def right(self) -> bool:
        """Whether it is set flush right: columns of fixed width hold numbers, or words short enough not to mind."""
        return self.width is not None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a sheet; `bright` lines are the ones to look at, `dim` ones may be passed over."""

    cells: tuple[str, ...]
    bright: bool = False
    dim: bool = False


class Sheet:
    """A table on stdout that can grow: widths do not depend on the content, so lines are printed as they come."""

    def __init__(self, columns: Sequence[Column], title: str = "", *, widest: int | None = None) -> None:
        """Takes the columns, each with a width or a share, and how wide the sheet may get (the terminal's width)."""
        self._columns = tuple(columns)
        self._title = title
        self._widest = widest
        self._started = False

    def add(self, lines: Iterable[Line]) -> None:
        """Prints lines; the first time with title and header."""
        first = not self._started
        self._started = True
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True, show_header=first, header_style="bold"
        )
        for column in self._columns:
            table.add_column(
                column.title,
                width=column.width,
                ratio=column.share,
                justify="right" if column.right else "left",
                overflow="fold",
            )
        for line in lines:
            style = "bold yellow" if line.bright else "dim" if line.dim else ""
            table.add_row(*(Text(plain(cell)) for cell in line.cells), style=style)
        console = _console()
        table.width = min(console.width, self._widest or console.width)
        if first and self._title:
            console.print()
            console.print(Text(self._title, style="bold"), soft_wrap=True)
        console.print(table)


Step = Callable[[int, str], None]


@contextmanager
def progress(label: str, total: int, *, lines: bool = False, beside: bool = False) -> Generator[Step]:
    """Shows how far something is, on stderr.

    Args:
        label: What is being done.
        total: How many steps there are.
        lines: Off a terminal, where there is no bar, whether to print a line at every tenth of the way.
        beside: Whether stdout is written meanwhile; on a terminal that shows both, the bar would be torn.

    Yields:
        A function that takes how many steps are done, and figures to show beside the bar.
    """
    if not sys.stderr.isatty() or (beside and sys.stdout.isatty()):
        yield _line_printer(label, total) if lines else lambda _done, _figures: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=_console(error=True), transient=True) as bar:
        task = bar.add_task(label, total=total, figures="")
        yield lambda done, figures: bar.update(task, completed=done, figures=figures)


def _line_printer(label: str, total: int) -> Step:
    shown, started = 0, time.monotonic()

    def step(done: int, figures: str) -> None:
        nonlocal shown
        tenth = 10 * done // total
        if tenth > shown:
            shown = tenth
            left = (time.monotonic() - started) / done * (total - done)
            say(f"{label} {done}/{total}  {figures}  {left:.0f} s left")

    return step
