"""One layout for policy files: indentation, spaces and line ends, with every comment kept.

What a file says is not touched: the order of keys, quotes and numbers stay as they are written, lines are not wrapped,
and the result is read again and compared before it is returned.
"""

from __future__ import annotations

import io

from ruamel.yaml import YAML

from safegen.errors import PolicySyntaxError, SafegenError
from safegen.policy.document import parse_document

_PASSES = 4  # a comment may move in the first pass, so the layout is repeated until nothing changes


def formatted(text: str, source: str) -> str:
    """Returns a YAML file in the one layout; laying it out again changes nothing.

    Args:
        text: The content of the file.
        source: What to call it in messages.

    Raises:
        PolicySyntaxError: Not YAML, or YAML that safegen refuses; all faults at once.
        SafegenError: The layout would change what the file says, or would not settle; the file is best left alone.
    """
    said = parse_document(text, source).value
    before = text
    for _ in range(_PASSES):
        after = _laid_out(before)
        if after == before:
            break
        before = after
    else:
        raise SafegenError(f"{source}: the layout does not settle; leave this file as it is and report it")
    try:
        same = repr(parse_document(before, source).value) == repr(said)
    except PolicySyntaxError:
        same = False
    if not same:
        raise SafegenError(f"{source}: the layout would change what the file says; leave it as it is and report it")
    return before


def _laid_out(text: str) -> str:
    yaml = YAML()  # round trip: comments, quotes and numbers as they are
    yaml.preserve_quotes = True
    yaml.width = 1 << 20
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(text.removeprefix("\ufeff").replace("\r\n", "\n"))
    out = io.StringIO()
    yaml.dump(content, out)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").split("\n")) + "\n"
