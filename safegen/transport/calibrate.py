"""Where a membrane's gate starts to open: a floor measured on captions that it must leave alone."""

from __future__ import annotations

from collections.abc import Sequence

from safegen.transport.encoding import TextReader
from safegen.transport.transport import Gate, Target

_MARGIN = 0.02
_LEAST = 0.6


def calibrated_floor(reader: TextReader, names: Sequence[str], negatives: Sequence[str]) -> float:
    """Returns the lowest floor at which no negative opens the membrane, with a margin.

    A prompt that holds a whole name scores 1 (token overlap) and passes any floor; what the floor decides is how close
    other prompts may come before they count.

    Args:
        reader: The host's text side.
        names: The names that the membrane erases.
        negatives: Captions that must not open it; those that hold all tokens of a name cannot be kept out, and are
            left out of account.

    Returns:
        In [0.6, 1].
    """
    gate = Gate(reader, [Target(tuple(names), 1.0)], lambda _: [()])
    highest = 0.0
    for start in range(0, len(negatives), 256):
        ids = reader.tokenise(negatives[start : start + 256])
        for (score,) in gate.read(reader.encode(ids), ids.tolist()):
            if score.token is not None and score.token < 1:
                highest = max(highest, score.clipcos, score.token)
    return round(min(1.0, max(_LEAST, highest + _MARGIN)), 4)
