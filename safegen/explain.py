"""Why a prompt opens what it opens: every score, every threshold, and the evidence of every word."""

from __future__ import annotations

import re
from dataclasses import dataclass

from safegen.decision import Decision
from safegen.gatekeeper import Gatekeeper
from safegen.transport.encoding import Token
from safegen.transport.evidence import token_evidence


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a prompt, as white space divides it.

    Attributes:
        start: Offset of its first character, in code points.
        end: Offset after its last character.
        weight: How much it speaks for a membrane, in [0, 1]; 1 is a part of a phrase, or the strongest token.
    """

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found.

    Attributes:
        decision: The decision, with all scores computed.
        tokens: All tokens of the prompt, with their places in it.
        read: How many of them the model reads; the rest is past its window.
        evidence: For each membrane, the fall of `direction` without each token that is read.
        words: The words of the prompt.
    """

    decision: Decision
    tokens: tuple[Token, ...]
    read: int
    evidence: tuple[tuple[float, ...], ...]
    words: tuple[Word, ...]


def explain(gatekeeper: Gatekeeper, prompt: str) -> Explanation:
    """Explains what a policy decides for a prompt, without drawing.

    Args:
        gatekeeper: Decides.
        prompt: Any text.

    Returns:
        The decision with its reasons; its token evidence takes one pass of the text encoder over a row per token.
    """
    backend = gatekeeper.backend
    (decision,) = gatekeeper.decide_texts([prompt], every=True, evidence=True)
    ids = backend.tokenise([prompt])[0].tolist()
    weights = token_evidence(gatekeeper.gate, backend, ids)
    read = backend.words(ids)
    evidence = tuple(tuple(round(value, 6) for value in column) for column in weights.T.tolist())
    tokens = backend.tokens(prompt)
    words = _words(prompt, decision, tokens[: len(read)], evidence)
    return Explanation(decision, tokens, len(read), evidence, words)


def _words(
    prompt: str, decision: Decision, tokens: tuple[Token, ...], evidence: tuple[tuple[float, ...], ...]
) -> tuple[Word, ...]:
    """Weighs the words: by the membranes that open, or by all where none does."""
    opened = [k for k, activation in enumerate(decision.activations) if activation.opened]
    columns = [evidence[k] for k in opened or range(len(evidence))]
    strongest = max((value for column in columns for value in column), default=0.0)
    places = [(t.start, t.end, 1.0) for k in opened for t in decision.activations[k].triggers if t.by == "lexical"]
    if strongest > 0:
        places += [
            (token.start, token.end, max(0.0, max(column[k] for column in columns) / strongest))
            for k, token in enumerate(tokens)
        ]
    return tuple(
        Word(m.start(), m.end(), max((w for s, e, w in places if s < m.end() and m.start() < e), default=0.0))
        for m in re.finditer(r"\S+", prompt)
    )
