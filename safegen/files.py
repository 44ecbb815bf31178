"""Files that a stop leaves whole: the old one or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, save: Callable[[Path], object]) -> None:
    """Lets `save` write beside `path`, makes that durable, then renames it.

    Args:
        path: The file to write; its folder is made.
        save: Writes the content to the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save(temporary)
    make_durable(temporary)
    temporary.replace(path)
    make_durable(path.parent)  # the new name too


def make_durable(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
