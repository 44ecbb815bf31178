"""What a policy extends: where its parents lie, and the document that comes of laying it over them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from safegen.errors import did_you_mean
from safegen.policy.consistency import entries
from safegen.policy.document import Document, Loc, Place

MAX_DEPTH = 8
MAX_FILES = 64
MAX_PARENTS = 16

_LISTS = ("rules", "exceptions")  # laid over each other by id
_OWN = ("apiVersion", "kind", "metadata", "extends", "override", "reason")  # each policy's own
_OWN_OF_ENTRIES = {"rules": ("override", "reason"), "exceptions": ("override",)}
_SHIPPED = "builtin://"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class NoParent(Exception):  # noqa: N818 - becomes a problem of the policy, with its place
    """Says why an entry of `extends` leads to no policy."""


def locate(entry: str, policy: Path, shipped: Mapping[str, Path]) -> Path:
    """Returns the file that an entry of `extends` names.

    Args:
        entry: `builtin://strict`, the bare name of a shipped policy, or a path relative to the policy.
        policy: The file that extends it.
        shipped: The shipped policies by name.

    Raises:
        NoParent: It names none; the message says what to do.
    """
    name = entry.removeprefix(_SHIPPED)
    if entry.startswith(_SHIPPED) or _NAME.fullmatch(entry):
        if name not in shipped:
            raise NoParent(
                f"unknown shipped policy {name!r}.{did_you_mean(name, shipped)} "
                "A path is written with its suffix, .yaml"
            )
        return shipped[name]
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", entry) and not PureWindowsPath(entry).drive:
        raise NoParent(
            f"{entry!r} is a URL, whose content can change; copy the policy beside this file and name the path"
        )
    if Path(entry).is_absolute() or PureWindowsPath(entry).drive or "\\" in entry:
        raise NoParent(
            f"{entry!r} is not a relative path with forward slashes, which would mean the same on every machine"
        )
    path = policy.parent / entry
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise NoParent(
            f"{entry!r} {what}; expected a path relative to this file, or the name of a shipped policy."
            f"{did_you_mean(Path(entry).stem, shipped)}"
        )
    return path


def laid_over(parents: Sequence[Document], child: Document) -> Document:
    """Lays a document over those that it extends.

    Keys of mappings are taken one by one, `rules` and `exceptions` by their ids; any other value of the child takes the
    place of the parents' whole. What stands in a later parent takes the place of what stands in an earlier one.

    Args:
        parents: The documents that it extends, in order, each already laid over its own parents.
        child: The document.

    Returns:
        The document that holds, in which every value knows the file that it comes from.
    """
    if not isinstance(child.value, dict):
        return child
    result: Document | None = None
    for parent in parents:
        if isinstance(parent.value, dict):
            bare = _without_own(parent)
            result = bare if result is None else _over(result, bare)
    return child if result is None else _over(result, child)


def _without_own(parent: Document) -> Document:
    value = {k: v for k, v in cast("dict[str, Any]", parent.value).items() if k not in _OWN}
    for name, own in _OWN_OF_ENTRIES.items():
        if isinstance(value.get(name), list):
            value[name] = [
                {k: v for k, v in entry.items() if k not in own} if isinstance(entry, dict) else entry
                for entry in value[name]
            ]
    return Document(parent.source, value, parent.values, parent.keys, parent.switches)


def _over(base: Document, top: Document) -> Document:
    below, above = cast("dict[str, Any]", base.value), cast("dict[str, Any]", top.value)
    value = _mapping_over(below, above)
    moved: dict[tuple[str, int], int] = {}
    for name in _LISTS:
        if isinstance(below.get(name), list) and isinstance(above.get(name), list):
            value[name] = _entries_over(name, below, above, moved)

    def here(loc: Loc) -> Loc:
        if len(loc) < 2:
            return loc
        return (loc[0], moved.get((str(loc[0]), cast(int, loc[1])), loc[1]), *loc[2:])

    def places(below: Mapping[Loc, Place], above: Mapping[Loc, Place]) -> dict[Loc, Place]:
        return {**below, **{here(loc): place for loc, place in above.items()}}

    switches = places(base.switches, top.switches)
    return Document(top.source, value, places(base.values, top.values), places(base.keys, top.keys), switches)


def _entries_over(
    name: str, below: Mapping[str, Any], above: Mapping[str, Any], moved: dict[tuple[str, int], int]
) -> list[Any]:
    """Returns a list laid over another by id, and notes in `moved` where the upper one's entries came to stand."""
    merged: list[Any] = list(below[name])
    waiting = {entry["id"]: k for k, entry in entries(below, name) if isinstance(entry.get("id"), str)}
    for k, entry in enumerate(cast("list[Any]", above[name])):
        place = (
            waiting.pop(entry.get("id"), None) if isinstance(entry, dict) and isinstance(entry.get("id"), str) else None
        )
        if place is None:
            moved[name, k] = len(merged)
            merged.append(entry)
        else:
            moved[name, k] = place
            merged[place] = _mapping_over(merged[place], entry)
    return merged


def _mapping_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    value = {**below, **above}
    for key in ("defaults", "audit", "transport"):
        if isinstance(below.get(key), dict) and isinstance(above.get(key), dict):
            value[key] = _mapping_over(below[key], above[key])
    return value
