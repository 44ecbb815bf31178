"""One layout for policy files: indentation, spaces and line ends, with every comment kept.

What a file says is not touched: the order of keys, quotes and numbers stay as they are written. A list or mapping in
brackets that does not fit on its line becomes one entry a line. The result is read again and compared before it is
returned.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from safegen.errors import SafegenError
from safegen.policy.document import MAX_DEPTH, parse_document

WIDTH = 120
"""Longest line that brackets may stand on."""
_NULL = re.compile(r"~|null|Null|NULL|")
_PASSES = MAX_DEPTH + 2  # brackets are opened from the outside in, one level a pass, until nothing changes


def formatted(text: str, source: str) -> str:
    """Returns a YAML file in the one layout; laying it out again changes nothing.

    Args:
        text: The content of the file.
        source: What to call it in messages.

    Raises:
        PolicySyntaxError: Not YAML, or YAML that safegen refuses; all faults at once.
        SafegenError: The layout would lose or move a comment, change what the file says, or would not settle.
    """
    parse_document(text, source)
    before = text.removeprefix("\ufeff").replace("\r\n", "\n")
    written = _written(before)
    for _ in range(_PASSES):
        after = _laid_out(before)
        if _kept(after) != written:  # opening brackets would misplace something: they stay as long as they are
            after = _laid_out(before, open_brackets=False)
        if after == before:
            break
        before = after
    else:
        raise SafegenError(f"{source}: the layout does not settle; leave this file as it is and report it")
    _check(written, _kept(before) or _Written((), ()), source)
    if repr(parse_document(before, source).value) != repr(parse_document(text, source).value):
        raise SafegenError(f"{source}: the layout would change what the file says; leave it as it is and report it")
    return before


@dataclass(frozen=True, slots=True)
class _Written:
    """What a layout keeps: the scalars as they are spelled, the comments, and how many scalars stand before each."""

    scalars: tuple[str, ...]
    comments: tuple[tuple[int, str], ...]


def _check(before: _Written, after: _Written, source: str) -> None:
    if before.comments != after.comments:
        lost = next((one for one in before.comments if one not in after.comments), before.comments[0])
        raise SafegenError(
            f"{source}: the comment {lost[1]!r} would be lost or moved; put it on a line of its own, outside of "
            "brackets"
        )
    if before.scalars != after.scalars:
        pairs = zip(before.scalars, after.scalars, strict=False)
        old, new = next(((old, new) for old, new in pairs if old != new), ("", ""))
        raise SafegenError(
            f"{source}: {ascii(old)} would be written {ascii(new)}, which may hide what is in it; write out letters "
            "that can be seen, and leave the rest of this file as it is"
        )


def _kept(text: str) -> _Written | None:
    """Returns what a text that was just laid out holds; None where that is no YAML any more."""
    try:
        return _written(text)
    except YAMLError:
        return None


def _written(text: str) -> _Written:
    scalars: list[str] = []
    comments: list[tuple[int, str]] = []
    done = 0
    events = [e for e in YAML(typ="safe", pure=True).parse(text) if type(e).__name__ == "ScalarEvent"]
    for number, event in enumerate([*events, None]):
        start = event.start_mark.index if event is not None else len(text)
        gap = re.findall(r"(?:^|(?<=\s))#.*", text[done:start], flags=re.MULTILINE)
        comments += [(number, comment.rstrip()) for comment in gap]
        if event is not None:
            done = max(done, event.end_mark.index)
            spelling = text[start : event.end_mark.index]
            block = event.style in ("|", ">")
            scalars.append(
                event.value if block else "null" if _NULL.fullmatch(spelling) else " ".join(spelling.split())
            )
    return _Written(tuple(scalars), tuple(comments))


def _laid_out(text: str, *, open_brackets: bool = True) -> str:
    yaml = YAML()  # round trip: comments, quotes and numbers as they are
    yaml.preserve_quotes = True
    yaml.width = 1 << 20  # never wraps the words of a text
    yaml.indent(mapping=2, sequence=4, offset=2)
    content: Any = yaml.load(text)
    if open_brackets:
        _open_brackets(content, [len(line) > WIDTH for line in text.split("\n")])
    out = io.StringIO()
    yaml.dump(content, out)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").split("\n")) + "\n"


def _open_brackets(node: Any, too_long: list[bool]) -> None:
    """Gives the outermost brackets on lines that are too long one entry a line."""
    if not isinstance(node, CommentedMap | CommentedSeq):
        return
    for key, part in list(node.items()) if isinstance(node, CommentedMap) else list(enumerate(node)):
        collection = isinstance(part, CommentedMap | CommentedSeq) and len(part)
        if collection and part.fa.flow_style() and too_long[part.lc.line]:
            part.fa.set_block_style()
            _hand_down(node, key, part)
        else:
            _open_brackets(part, too_long)


def _hand_down(parent: Any, key: Any, part: Any) -> None:
    """Moves what follows brackets (a comment, blank lines) behind the last of their entries."""
    slots = parent.ca.items.get(key)
    slot = 2 if isinstance(parent, CommentedMap) else 0
    token = slots[slot] if slots else None
    if token is None:
        return
    slots[slot] = None
    last = list(part)[-1] if isinstance(part, CommentedMap) else len(part) - 1
    token.start_mark.column = 0
    own = 2 if isinstance(part, CommentedMap) else 0
    part.ca.items.setdefault(last, [None, None, None, None])[own] = token
