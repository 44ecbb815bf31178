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
    """Returns the content of those files of a catalogue folder whose compiled form fits them, by file name."""
    path = folder / NAME
    if not path.is_file():
        return {}
    known = cast("dict[str, dict[str, Any]]", json.loads(path.read_bytes()))
    return {
        name: one["content"]
        for name, one in known.items()
        if (folder / name).is_file() and _digest(folder / name) == one["sha256"]
    }


def compile_folder(folder: Path) -> str:
    """Returns the compiled form of all files of a catalogue folder."""
    files = sorted(folder.glob("*.yaml"))
    found = {path.name: {"sha256": _digest(path), "content": read_document(path).value} for path in files}
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"), sort_keys=False) + "\n"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    concepts = shipped("policies") / "concepts"
    (concepts / NAME).write_text(compile_folder(concepts), "utf-8")
