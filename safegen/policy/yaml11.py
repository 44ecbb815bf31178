"""Plain scalars that YAML 1.1 tools read as something else than YAML 1.2 does.

`yes`, `no`, `on` and `off` are not here: without quotes they are faults of a policy (`safegen.policy.faults`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from safegen.policy.document import Place

_MEANINGS = (
    (re.compile(r"y|Y|n|N"), "true or false"),
    (re.compile(r"[-+]?0[0-7]+"), "an octal number"),
    (re.compile(r"[-+]?0b[01_]+"), "a binary number"),
    (re.compile(r"[-+]?[0-9][0-9_]*_[0-9_]*"), "a number"),
    (re.compile(r"[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"), "a number to base 60"),
)


def misread(path: Path) -> Iterator[tuple[Place, str, str]]:
    """Yields the plain scalars of a file that YAML 1.1 reads otherwise.

    Args:
        path: A file that `read_document` accepts.

    Yields:
        Where it stands, the scalar, and what YAML 1.1 takes it for.
    """
    for event in YAML(typ="safe", pure=True).parse(path.read_text("utf-8-sig")):
        found: Any = event
        if type(found).__name__ != "ScalarEvent" or found.style is not None:
            continue
        for pattern, meant in _MEANINGS:
            if pattern.fullmatch(found.value):
                mark = found.start_mark
                yield Place(str(path), mark.line + 1, mark.column + 1), found.value, meant
                break
