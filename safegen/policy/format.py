"""One layout for policy files: indentation, spaces and line ends, with every comment kept.

What a file says is not touched: the order of keys, quotes and numbers stay as they are written. A list or mapping in
brackets that does not fit on its line becomes one entry a line. The result is read again and compared before it is
returned.
"""

from __future__ import annotations

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from safegen.errors import PolicySyntaxError, SafegenError
from safegen.policy.document import MAX_DEPTH, parse_document

WIDTH = 120
"""Longest line that brackets may stand on."""
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
    said = parse_document(text, source).value
    before = text.removeprefix("\ufeff").replace("\r\n", "\n")
    comments = _comments(before)
    for _ in range(_PASSES):
        after = _laid_out(before)
        if _comments(after) != comments:
            after = _laid_out(before, open_brackets=False)
        if after == before:
            break
        before = after
    else:
        raise SafegenError(f"{source}: the layout does not settle; leave this file as it is and report it")
    if _comments(before) != comments:
        lost = next((one for one in comments if one not in _comments(before)), comments[0])
        raise SafegenError(
            f"{source}: the comment {lost[1]!r} would be lost or moved; put it on a line of its own, outside of "
            "brackets"
        )
    try:
        same = repr(parse_document(before, source).value) == repr(said)
    except PolicySyntaxError:
        same = False
    if not same:
        raise SafegenError(f"{source}: the layout would change what the file says; leave it as it is and report it")
    return before


def _comments(text: str) -> list[tuple[int, str]]:
    """Returns the comments of a YAML text, each with how many scalars stand before it."""
    spans = [
        (event.start_mark.index, event.end_mark.index)
        for event in YAML(typ="safe", pure=True).parse(text)
        if type(event).__name__ == "ScalarEvent"
    ]
    found: list[tuple[int, str]] = []
    done = 0
    for number, (start, end) in enumerate([*spans, (len(text), len(text))]):
        gap = text[done:start]
        found += [(number, comment.rstrip()) for comment in re.findall(r"(?:^|(?<=\s))#.*", gap, flags=re.MULTILINE)]
        done = max(done, end)
    return found


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
