"""Where the files of a log are, and their lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from safegen.audit.chain import MAX_RECORD_BYTES
from safegen.audit.digest import SUFFIX
from safegen.errors import UsageError

TOMBSTONES = "tombstones.jsonl"


def segment_files(path: Path) -> list[Path]:
    """Returns a segment file, or every segment below a folder, by path.

    Raises:
        UsageError: Nothing exists at `path`, or a folder below it cannot be read.
    """
    if path.exists() and not path.is_dir():
        return [path]
    return [file for file in _files(path) if not file.name.endswith(SUFFIX) and file != path / TOMBSTONES]


def digest_files(path: Path) -> list[Path]:
    """Returns every file of digests below a folder, by path; see `segment_files`."""
    return [file for file in _files(path) if file.name.endswith(SUFFIX)]


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UsageError(f"{path}: expected an audit segment or the folder of a log, found nothing there")

    def refuse(error: OSError) -> None:  # pathlib's rglob would skip the folder, and its segments, in silence
        raise UsageError(f"{error.filename}: cannot be read: {error.strerror}; give this user read access")

    files = [Path(root, name) for root, _, names in os.walk(path, onerror=refuse) for name in names]
    return sorted(file for file in files if file.suffix == ".jsonl" and file.is_file())


def lines_of(file: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yields (number from 1, line without newline, whether it is whole).

    Of a line over the limit only the first part is yielded, as whole: no writer of ours tears a line of that length,
    and `parse_line` refuses it.

    Raises:
        OSError: The file cannot be read.
    """
    with file.open("rb") as handle:
        number = 0
        while line := handle.readline(MAX_RECORD_BYTES + 1):
            number += 1
            too_long = len(line) > MAX_RECORD_BYTES
            yield number, line.removesuffix(b"\n"), too_long or line.endswith(b"\n")
            while too_long and not line.endswith(b"\n") and line:
                line = handle.readline(MAX_RECORD_BYTES)
