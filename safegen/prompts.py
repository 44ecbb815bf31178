"""Reads prompts from a file: one row at a time, with a limit on what one row may take.

| file | content |
|---|---|
| `.txt`, no suffix, `-` (standard input) | one prompt per line; blank lines are skipped |
| `.csv` | a column `prompt` (or `text`, `caption`), optionally `negative_prompt`; blank rows are skipped |
| `.jsonl` | one value per line: an object with these keys, or a string; blank lines are skipped |

All are UTF-8, with or without a byte order mark. One line, and one row of a CSV file, holds at most 64 KiB.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from safegen.errors import PromptsFileError

MAX_LINE_BYTES = 64 * 1024
TEXT_FIELDS = ("prompt", "text", "caption")
NEGATIVE_FIELD = "negative_prompt"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt of a file.

    Attributes:
        index: Number among the prompts, from 0.
        text: The prompt as it stands in the file, without its line end; never blank.
        negative: The negative prompt, or None.
        line: Line in the file where the row starts, from 1.
    """

    index: int
    text: str
    negative: str | None
    line: int


def read_prompts(path: str | Path) -> Iterator[PromptRow]:
    """Returns an iterator over the prompts of a file, or of standard input for `-`, in constant memory.

    A path that cannot be a prompts file is refused by the call itself; faults of the content are found on the way.

    Raises:
        PromptsFileError: The file is missing, a folder, of another kind, empty, not UTF-8, or malformed; the message
            names file and line, what was expected, what was found, and what to do.
    """
    if str(path) == "-":
        return _Reader("standard input", None).rows()
    path = Path(path)
    try:
        if path.is_dir():
            raise PromptsFileError(f"{path}: expected a prompts file, found a folder; name a file inside it")
        if not path.exists():
            raise PromptsFileError(f"{path}: expected a prompts file, found nothing there; check the path")
    except OSError as error:  # such as a prompt, too long for a file name, in the place of the path
        raise PromptsFileError(
            f"{str(path)[:200]}: expected a prompts file: {error.strerror}; check the path"
        ) from error
    if path.suffix.lower() not in ("", ".txt", ".csv", ".jsonl"):
        raise PromptsFileError(
            f"{path}: expected .txt (one prompt per line), .csv or .jsonl, found {path.suffix!r}; rename or convert it"
        )
    return _Reader(str(path), path).rows()


class _Reader:
    """One pass over one file."""

    def __init__(self, name: str, path: Path | None) -> None:
        self._name = name
        self._path = path
        self._suffix = "" if path is None else path.suffix.lower()
        self._line = 0  # the line read last, from 1
        self._row_bytes = 0  # bytes of the current CSV row so far

    def rows(self) -> Iterator[PromptRow]:
        index = 0
        try:
            with self._path.open("rb") if self._path else nullcontext(sys.stdin.buffer) as file:
                for text, negative, line in self._parse(file):
                    yield PromptRow(index, text, negative, line)
                    index += 1
        except OSError as error:
            raise PromptsFileError(f"{self._name}: cannot be read: {error.strerror}; check its permissions") from error
        if index == 0:
            raise PromptsFileError(
                f"{self._name}: expected at least one prompt, found none; put a prompt into the file"
            )

    def _parse(self, file: BinaryIO) -> Iterator[tuple[str, str | None, int]]:
        lines = self._lines(file)
        if self._suffix == ".csv":
            return self._parse_csv(lines)
        return self._parse_jsonl(lines) if self._suffix == ".jsonl" else self._parse_text(lines)

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        offset = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            self._line += 1
            self._row_bytes += len(raw)
            if self._line == 1 and raw.startswith(codecs.BOM_UTF8):
                offset, raw = len(codecs.BOM_UTF8), raw[len(codecs.BOM_UTF8) :]
            if self._row_bytes > MAX_LINE_BYTES:
                self._fail(
                    f"expected at most {MAX_LINE_BYTES} bytes (64 KiB) in a line or CSV row, found more",
                    "split it; in a CSV file, look for a quote that is not closed",
                )
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                place = offset + error.start
                self._fail(f"expected UTF-8, found byte 0x{raw[error.start]:02x} at offset {place}", "save it as UTF-8")
            if "\0" in text:
                self._fail("expected text, found a NUL byte", "save it as UTF-8 text (it may be binary, or UTF-16)")
            offset += len(raw)
            yield text
            if self._suffix != ".csv":
                self._row_bytes = 0

    def _parse_text(self, lines: Iterator[str]) -> Iterator[tuple[str, str | None, int]]:
        for line in lines:
            text = line.rstrip("\r\n")
            if "\r" in text:
                self._fail("expected lines that end in LF or CRLF, found a lone CR", "save it with Unix line ends")
            if text.strip():
                yield text, None, self._line

    def _parse_jsonl(self, lines: Iterator[str]) -> Iterator[tuple[str, str | None, int]]:
        for line in lines:
            if not line.strip():
                continue
            try:
                value: object = json.loads(line)
            except json.JSONDecodeError as error:
                self._fail(
                    f"expected one JSON value, found a fault at column {error.colno}: {error.msg}", "correct the line"
                )
            except (RecursionError, ValueError):
                self._fail("expected an object or a string, found nesting or a number beyond all limits", "correct it")
            if isinstance(value, str):
                yield self._checked(value, "prompt"), None, self._line
            elif isinstance(value, dict):
                yield *self._from_object(cast(dict[str, object], value)), self._line
            else:
                self._fail(f"expected a JSON object or string, found {type(value).__name__}", "correct the line")

    def _from_object(self, value: Mapping[str, object]) -> tuple[str, str | None]:
        name = next((name for name in TEXT_FIELDS if name in value), None)
        if name is None:
            self._fail_name("key", value)
        negative = value.get(NEGATIVE_FIELD)
        return (
            self._checked(value[name], name),
            None if negative is None else self._checked(negative, NEGATIVE_FIELD, blank=True) or None,
        )

    def _parse_csv(self, lines: Iterator[str]) -> Iterator[tuple[str, str | None, int]]:
        rows = self._csv_rows(lines)
        header, _ = next(rows, ([], 0))
        if not header:
            return
        names = [name.strip().lower() for name in header]
        column = next((name for name in TEXT_FIELDS if name in names), None)
        if column is None:
            self._fail_name("column", header)
        for name in (column, NEGATIVE_FIELD):
            if names.count(name) > 1:
                self._fail(f"expected one column {name!r}, found {names.count(name)}", "rename all but one")
        for cells, line in rows:
            if len(cells) != len(names):
                self._fail(
                    f"expected {len(names)} cells as in the header, found {len(cells)}",
                    "put a prompt that contains a comma into double quotes",
                    line,
                )
            row = dict(zip(names, cells, strict=True))
            text = self._checked(row[column], column, line)
            yield text, row.get(NEGATIVE_FIELD) or None, line

    def _csv_rows(self, lines: Iterator[str]) -> Iterator[tuple[list[str], int]]:
        # The row limit is below csv's default limit for a field, so the process-wide csv.field_size_limit stays alone.
        rows = csv.reader(lines, strict=True)
        while True:
            start = self._line + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                self._fail(f"expected CSV, found a fault: {error}", "correct the quotes of this row", start)
            if cells is None:
                return
            self._row_bytes = 0
            if any(cell.strip() for cell in cells):
                yield cells, start

    def _checked(self, value: object, name: str, line: int | None = None, *, blank: bool = False) -> str:
        if not isinstance(value, str):
            self._fail(f"expected text as {name!r}, found {type(value).__name__}", "put it into quotes", line)
        if not blank and not value.strip():
            self._fail(f"expected text as {name!r}, found a blank", "fill it in, or delete the row", line)
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            self._fail(f"expected text as {name!r}, found NUL or half of a surrogate pair", "correct the escape", line)
        return value

    def _fail_name(self, kind: str, found: Collection[str]) -> NoReturn:
        names = ", ".join(repr(name) for name in found)
        shown = (names if len(names) <= 200 else names[:200] + "…") or "none"
        close = (match for field in TEXT_FIELDS for match in get_close_matches(field, found, n=1))
        advice = next((f"rename {kind} {name!r} to 'prompt'" for name in close), f"rename the {kind} of the prompts")
        self._fail(f"expected a {kind} 'prompt', 'text' or 'caption', found {shown}", advice)

    def _fail(self, what: str, advice: str, line: int | None = None) -> NoReturn:
        raise PromptsFileError(f"{self._name}:{line or self._line}: {what}; {advice}")
