"""One YAML 1.2 document, read strictly: plain values, and the line and column of each.

Policies are reviewed by people and parsed by machines; both must see the same thing. So the reader refuses what hides
content (anchors, aliases, merge keys, tags, duplicate keys), caps size, depth and node count, and resolves scalars by
the YAML 1.2 core schema itself: `off` is text, not false. Plain values are built from the parser's events, iteratively,
so nesting cannot exhaust the stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from safegen.errors import PolicyNotFoundError, PolicySyntaxError, Problem

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 20_000

Loc = tuple[str | int, ...]
"""The path of a value: `("rules", 0, "action")`."""


class Place(NamedTuple):
    """Where a value stands: the file, and line and column from 1."""

    source: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"


_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_SWITCH = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")
_INT = re.compile(r"[-+]?[0-9]{1,18}")  # longer ones are read as floats, in constant time
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed document.

    Attributes:
        source: File name, for messages.
        value: The content as dicts with text keys, lists, text, numbers, booleans and None.
        values: Where each value stands.
        keys: Where each mapping key stands, under the path of its value.
        switches: Values and keys (under the path of the value) that YAML 1.1 reads as true or false: yes, no, on, off
            without quotes.
    """

    source: str
    value: object
    values: Mapping[Loc, Place]
    keys: Mapping[Loc, Place]
    switches: Mapping[Loc, Place] = field(default_factory=dict[Loc, Place])

    def position(self, loc: Loc, *, key: bool = False) -> Place:
        """Returns the place of the value at `loc` (of its key, with `key`), or of what encloses it."""
        if key and loc in self.keys:
            return self.keys[loc]
        while loc and loc not in self.values:
            loc = loc[:-1]
        return self.values.get(loc, Place(self.source, 1, 1))

    def problem(self, loc: Loc, message: str, *, key: bool = False) -> Problem:
        """Returns a `Problem` that points at `loc`."""
        return Problem(str(self.position(loc, key=key)), message)


def read_document(path: Path) -> Document:
    """Reads a YAML file.

    Raises:
        PolicyNotFoundError: There is no such file, or it cannot be read.
        PolicySyntaxError: Too large, not UTF-8, or anything `parse_document` refuses.
    """
    return parse_document(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Returns the text of a file, a byte order mark at its start included.

    Raises:
        PolicyNotFoundError: There is no such file, or it cannot be read.
        PolicySyntaxError: Too large, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PolicyNotFoundError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        text = f"the file is larger than {MAX_BYTES // 1024} KiB; split it"
        raise PolicySyntaxError([Problem(f"{path}:1:1", text)])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        text = f"not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        raise PolicySyntaxError([Problem(f"{path}:{line}:{column}", text)]) from error


def parse_document(text: str, source: str) -> Document:
    """Parses one YAML document.

    Args:
        text: The document.
        source: What to call it in messages.

    Raises:
        PolicySyntaxError: Not YAML, empty, over a cap, or with refused features; one line per fault.
    """
    builder = _Builder(source)
    try:
        for event in YAML(typ="safe", pure=True).parse(text.removeprefix("\ufeff")):
            builder.take(event)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        builder.refuse(mark, f"not YAML: {error.problem or error.context}")
    except YAMLError as error:
        builder.refuse(None, f"not YAML: {str(error).splitlines()[0]}")
    if not builder.faults and not builder.values:
        builder.refuse(None, "the file is empty; it starts with `apiVersion: safegen.dev/v1`")
    if builder.faults:
        raise PolicySyntaxError(builder.faults)
    return Document(source, builder.root, builder.values, builder.keys, builder.switches)


def _scalar(text: str) -> object:
    """Returns a plain scalar by the YAML 1.2 core schema."""
    readers: tuple[tuple[re.Pattern[str], Callable[[str], object]], ...] = (
        (_NULL, lambda _: None),
        (_TRUE, lambda _: True),
        (_FALSE, lambda _: False),
        (_INT, int),
        (_FLOAT, float),
    )
    return next((read(text) for pattern, read in readers if pattern.fullmatch(text)), text)


@dataclass(slots=True)
class _Open:
    """A collection whose end has not come yet; `key` is the mapping key that waits for its value."""

    content: dict[str, object] | list[object]
    loc: Loc
    key: str | None = None


@dataclass(slots=True)
class _Builder:
    """Turns parser events into plain values, collecting every refused feature on the way."""

    source: str
    root: object = None
    faults: list[Problem] = field(default_factory=list[Problem])
    values: dict[Loc, Place] = field(default_factory=dict[Loc, Place])
    keys: dict[Loc, Place] = field(default_factory=dict[Loc, Place])
    switches: dict[Loc, Place] = field(default_factory=dict[Loc, Place])
    stack: list[_Open] = field(default_factory=list[_Open])
    nodes: int = 0
    documents: int = 0

    def refuse(self, mark: Any, message: str) -> None:
        """Notes a fault at a parser mark (the start of the file without one)."""
        self.faults.append(Problem(str(self._at(mark)), message))

    def _at(self, mark: Any) -> Place:
        return Place(self.source, mark.line + 1, mark.column + 1) if mark is not None else Place(self.source, 1, 1)

    def take(self, event: Any) -> None:
        """Takes the parser's next event.

        Raises:
            PolicySyntaxError: A cap is exceeded, which ends the reading at once.
        """
        kind = type(event).__name__
        if kind == "DocumentStartEvent":
            self._start_document(event)
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            self.stack.pop()
        elif kind in ("ScalarEvent", "AliasEvent", "MappingStartEvent", "SequenceStartEvent"):
            self._count(event)
            self._take_node(kind, event)

    def _start_document(self, event: Any) -> None:
        self.documents += 1
        if self.documents > 1:
            self.refuse(event.start_mark, "a second document starts here; keep one document per file")
        if event.version not in (None, (1, 2)) or event.tags:
            self.refuse(event.start_mark, "directives are refused; write YAML 1.2 without any")

    def _count(self, event: Any) -> None:
        self.nodes += 1
        for over, what in (
            (self.nodes > MAX_NODES, f"more than {MAX_NODES} values; split the file"),
            (len(self.stack) >= MAX_DEPTH, f"nested deeper than {MAX_DEPTH} levels; no policy needs that"),
        ):
            if over:
                self.refuse(event.start_mark, what)
                raise PolicySyntaxError(self.faults)

    def _take_node(self, kind: str, event: Any) -> None:
        if event.anchor is not None:
            sign = "alias *" if kind == "AliasEvent" else "anchor &"
            self.refuse(event.start_mark, f"{sign}{event.anchor} is refused; write the value out where it is used")
        if kind != "AliasEvent" and event.ctag is not None:
            self.refuse(event.start_mark, f"tag {event.ctag} is refused; plain values only")
        parent = self.stack[-1] if self.stack else None
        if parent is not None and isinstance(parent.content, dict) and parent.key is None:
            self._take_key(parent, kind, event)
            return
        loc = self._place(parent)
        absent = kind == "ScalarEvent" and event.value == "" and event.style is None  # stands where the next thing is
        here = self._at(event.start_mark)
        self.values[loc] = self.keys.get(loc, here) if absent else here
        self._note_switch(loc, kind, event)
        value: Any = None
        if kind == "ScalarEvent":
            value = _scalar(event.value) if event.style is None and event.implicit[0] else event.value
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            value = {} if kind == "MappingStartEvent" else []
            self.stack.append(_Open(value, loc))
        self._store(parent, value)

    def _take_key(self, parent: _Open, kind: str, event: Any) -> None:
        parent.key = str(event.value) if kind == "ScalarEvent" else "?"
        if kind != "ScalarEvent":
            self.refuse(event.start_mark, "a key must be plain text")
        if kind in ("MappingStartEvent", "SequenceStartEvent"):
            self.stack.append(_Open({} if kind == "MappingStartEvent" else [], (*parent.loc, "?")))
            return
        if parent.key == "<<" and event.style is None:
            self.refuse(event.start_mark, "merge key << is refused; write the keys out")
        loc = (*parent.loc, parent.key)
        if loc in self.keys:
            first = self.keys[loc]
            text = f"duplicate key {parent.key!r}; first at line {first.line}, column {first.column}"
            self.refuse(event.start_mark, text)
        else:
            self.keys[loc] = self._at(event.start_mark)
            self._note_switch(loc, kind, event)

    def _note_switch(self, loc: Loc, kind: str, event: Any) -> None:
        if kind == "ScalarEvent" and event.style is None and _SWITCH.fullmatch(event.value):
            self.switches[loc] = self._at(event.start_mark)

    def _place(self, parent: _Open | None) -> Loc:
        if parent is None:
            return ()
        return (*parent.loc, parent.key if parent.key is not None else len(parent.content))

    def _store(self, parent: _Open | None, value: object) -> None:
        if parent is None:
            self.root = value
        elif isinstance(parent.content, list):
            parent.content.append(value)
        else:
            parent.content[parent.key or ""] = value
            parent.key = None
