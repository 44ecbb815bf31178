"""Which words caused it: the score of a prompt with one token left out at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safegen.transport.encoding import TextReader, Token
from safegen.transport.scores import evidence
from safegen.transport.transport import Gate

_SHARE = 0.5  # of the strongest token's evidence: what a token needs to count as a trigger


@dataclass(frozen=True, slots=True)
class Trigger:
    """A place in the prompt that speaks for a concept.

    Attributes:
        start: Offset of its first character in the prompt, in code points.
        end: Offset after its last character.
        by: `lexical`: a whole phrase of the concept; `evidence`: tokens without which the score `direction` falls.
        weight: 1 for a phrase; for tokens, how far the score falls without them.
        changes: What had to be normalised to find a phrase.
    """

    start: int
    end: int
    by: Literal["lexical", "evidence"]
    weight: float
    changes: tuple[str, ...] = ()


def token_evidence(gate: Gate, reader: TextReader, ids: Sequence[int]) -> Tensor:
    """Returns the evidence of each real token of a prompt: the fall of `direction` when it is left out.

    Args:
        gate: The gate, with its targets.
        reader: The host's text side; its encoder runs once over one row for each token.
        ids: Token ids of one window.

    Returns:
        [tokens, targets]; the tokens are those of `reader.words(ids)`.
    """
    real = [token for token, _ in reader.words(ids)]
    if not real or not gate.targets:
        return torch.zeros(len(real), len(gate.targets))
    first = 1 if list(ids[1 : 1 + len(real)]) == real else 0
    pad = reader.tokenise([""])[0, -1].item()
    rows = [list(ids), *([*ids[:k], *ids[k + 1 :], pad] for k in range(first, first + len(real)))]
    batch = torch.tensor(rows)
    parts = [reader.encode(batch[k : k + 64]) for k in range(0, len(batch), 64)]
    scores = torch.cat([gate.read(part, [None] * len(part), every=True).graded["direction"] for part in parts])
    return evidence(scores[0], scores[1:])


def triggers(found: Tensor, tokens: Sequence[Token]) -> tuple[Trigger, ...]:
    """Returns the tokens that speak most for a concept, neighbours joined.

    Args:
        found: Evidence of each token for one concept, [tokens].
        tokens: The tokens with their places in the prompt.

    Returns:
        Tokens with at least half of the strongest token's evidence, in reading order; none where no token speaks for
        it.
    """
    least = _SHARE * float(found.max()) if len(found) else 0.0
    if least <= 0:
        return ()
    joined: list[Trigger] = []
    previous = -2
    for k, (token, weight) in enumerate(zip(tokens, found.tolist(), strict=True)):
        if weight < least:
            continue
        if previous == k - 1:
            last = joined.pop()
            joined.append(Trigger(last.start, token.end, "evidence", max(last.weight, weight)))
        else:
            joined.append(Trigger(token.start, token.end, "evidence", weight))
        previous = k
    return tuple(joined)
