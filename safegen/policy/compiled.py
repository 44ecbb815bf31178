"""The shipped catalogue in a form that is read in milliseconds: JSON beside the YAML files, bound to their bytes.

Parsing the YAML takes a second or more, which every command would pay. The compiled form counts for a file only while
the file has the bytes that it was made from; an edited file is read itself. Make it anew after an edit:

    python -m safegen.policy.compiled
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from safegen.policy.document import read_document
from safegen.resources import shipped

NAME = "compiled.json"


def read_compiled(folder: Path) -> dict[str, Any]:
    """Returns the content of those files of a catalogue folder whose compiled form fits them, by file name.

    A compiled form that is missing or damaged fits none; nothing but time is lost.
    """
    path = folder / NAME
    try:
        known = cast("dict[str, dict[str, Any]]", json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}
    return {
        name: one["content"]
        for name, one in known.items()
        if (folder / name).is_file() and _digest(folder / name) == one["sha256"]
    }


def compile_folder(folder: Path) -> str:
    """Returns the compiled form of all files of a catalogue folder."""
    lines: list[str] = []  # one per file, so that edits of different files do not meet
    for path in sorted(folder.glob("*.yaml")):
        found = {"sha256": _digest(path), "content": read_document(path).value}
        lines.append(f"{json.dumps(path.name)}:{json.dumps(found, ensure_ascii=False, separators=(',', ':'))}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    concepts = shipped("policies") / "concepts"
    (concepts / NAME).write_text(compile_folder(concepts), "utf-8")
