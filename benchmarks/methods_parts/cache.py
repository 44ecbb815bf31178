"""Results on disk, written whole or not at all, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import safegen
from safegen.evaluation.methods import Method, adapters, host, weights

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ROOT = Path(safegen.__file__).parent
_SHARED = [Path(str(module.__file__)) for module in (adapters, host, weights)]


def _code(path: Path) -> str:
    """Returns what a source file does, without comments and docstrings."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def describe(method: Method) -> dict[str, Any]:
    """Returns what a method's result depends on: its settings, and a digest of the code that it runs."""
    own = {Path(inspect.getfile(c)) for c in type(method).__mro__ if c.__module__.startswith("safegen.")}
    paths = sorted(own.union(_SHARED))
    if method.name == "safegen":
        paths += sorted((_ROOT / "training").glob("*.py"))
    code = hashlib.sha256("\n".join(_code(path) for path in paths).encode()).hexdigest()
    return {"name": method.name, "settings": dataclasses.asdict(method), "code": code}  # pyright: ignore[reportArgumentType]


class Cache:
    """A folder of results; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def _path(self, name: str, key: Mapping[str, Any], ending: str) -> Path | None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self._folder / f"{name}-{digest}.{ending}" if self._folder is not None else None

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)

    def result(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns what was kept under a key, or None."""
        path = self._path(name, key, "json")
        return json.loads(path.read_text("utf-8"))["result"] if path is not None and path.is_file() else None

    def keep(self, name: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keeps a result with its key."""
        path = self._path(name, key, "json")
        if path is not None:
            self._write(path, (json.dumps({"key": key, "result": result}, indent=1) + "\n").encode())

    def images(self, name: str, key: Mapping[str, Any]) -> NDArray[np.uint8] | None:
        """Returns images kept under a key, [n, h, w, 3], or None."""
        path = self._path(name, key, "npy")
        return np.load(path, allow_pickle=False) if path is not None and path.is_file() else None

    def keep_images(self, name: str, key: Mapping[str, Any], images: NDArray[np.uint8]) -> None:
        """Keeps images."""
        path = self._path(name, key, "npy")
        if path is not None:
            content = io.BytesIO()
            np.save(content, images, allow_pickle=False)
            self._write(path, content.getvalue())
