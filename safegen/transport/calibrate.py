"""Measures from which score on a membrane opens: prompts that name its concept against prompts that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from safegen.errors import UsageError
from safegen.text import PhraseMatcher
from safegen.transport.calibration import Calibration
from safegen.transport.encoding import TextReader
from safegen.transport.sentence import SentenceEncoder
from safegen.transport.transport import Gate, Target

_BATCH = 64
_KEPT_OUT = 0.998  # share of the negatives that must stay below `lo` where the two groups overlap
_REACHED = 0.01  # share of the positives that may score below what both thresholds are measured from


def calibrate(
    reader: TextReader,
    names: Sequence[str],
    positives: Sequence[str],
    negatives: Sequence[str],
    *,
    neighbours: Sequence[str] = (),
    sentence: SentenceEncoder | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> tuple[Calibration, ...]:
    """Measures the thresholds of every graded score for one membrane on one text encoder.

    Args:
        reader: The host's text side.
        names: The names that the membrane erases; what the scores are taken with.
        positives: Prompts that name the concept.
        negatives: Prompts that do not: captions of anything else. Those that hold one of `names` as a whole phrase are
            left out.
        neighbours: More of them, of what a person might take for the concept: `lo` lies above each of these.
        sentence: Sentence encoder to calibrate the score `semantic` with too.
        report: Called with how many prompts have been scored.

    Returns:
        Calibrations of `direction`, `paper` and, with a sentence encoder, `semantic`.

    Raises:
        UsageError: No positive, or no negative that is none.
    """
    matcher = PhraseMatcher(names)
    near, far = ([text for text in dict.fromkeys(texts) if not matcher.find(text)] for texts in (neighbours, negatives))
    others = list(dict.fromkeys((*near, *far)))
    named = list(dict.fromkeys(positives))
    if not named or not others:
        raise UsageError(
            f"calibrating {names[0]!r} takes prompts that name it and prompts that do not; found {len(named)} and "
            f"{len(others)}; give more captions"
        )
    gate = Gate(reader, [Target(tuple(names), {})], lambda _: {}, sentence=sentence)
    scores = _scored(gate, reader, [*named, *others], report)
    encoders = {"direction": reader.fingerprint, "paper": reader.fingerprint}
    if sentence is not None:
        encoders["semantic"] = sentence.fingerprint
    found: list[Calibration] = []
    for score, encoder in encoders.items():
        high, low = scores[score][: len(named)], scores[score][len(named) :]
        close, rest = low[: len(near)], low[len(near) :]
        lo, hi = thresholds(high, rest if len(rest) else close, close)
        counts = {"positives": len(named), "negatives": len(others)}
        rates = {"auroc": auroc(high, low), "false_open_at_99": false_open_at_99(high, low)}
        found.append(Calibration(score, encoder, lo, hi, **{k: round(v, 6) for k, v in rates.items()}, **counts))
    return tuple(found)


def _scored(gate: Gate, reader: TextReader, texts: Sequence[str], report: Callable[[int], None]) -> dict[str, Tensor]:
    parts: list[Mapping[str, Tensor]] = []
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        ids = reader.tokenise(part)
        parts.append(gate.read(reader.encode(ids), ids.tolist(), every=True).graded)
        report(min(start + _BATCH, len(texts)))
    return {score: torch.cat([part[score][:, 0] for part in parts]).double() for score in parts[0]}


def thresholds(positives: Tensor, negatives: Tensor, neighbours: Tensor | None = None) -> tuple[float, float]:
    """Returns `lo` and `hi` for the scores of prompts that name a concept and of prompts that do not.

    Where the lowest positives (one in a hundred aside) are above the highest negative, the thresholds lie inside that
    gap, at a quarter and a half of it. Elsewhere the groups overlap: `lo` keeps all neighbours out and all negatives
    but one in 500 (what else must open opens by words), and `hi` is what half of the positives reach, or just above
    `lo`.

    Args:
        positives: Scores, [n].
        negatives: Scores, [m].
        neighbours: Scores, [k], of what must stay out whatever else that costs.

    Returns:
        `lo` and `hi`, in [-1, 1], rounded to six digits.
    """
    near = negatives[:0] if neighbours is None else neighbours
    lowest, highest = float(positives.quantile(_REACHED)), float(torch.cat([negatives, near]).max())
    if lowest > highest:
        gap = lowest - highest
        lo, hi = highest + gap / 4, highest + gap / 2
    else:
        lo = float(negatives.quantile(_KEPT_OUT, interpolation="higher"))
        lo = max([lo, *near.tolist()])
        lo += 0.02 * (1 - lo)
        hi = max(float(positives.median()), lo + 0.1 * (1 - lo))
    return round(min(lo, 1.0), 6), round(min(hi, 1.0), 6)


def auroc(positives: Tensor, negatives: Tensor) -> float:
    """Returns the share of pairs in which the positive scores higher than the negative, ties counted half, in [0, 1].

    Args:
        positives: Scores, [n], n at least 1.
        negatives: Scores, [m], m at least 1.
    """
    ordered = negatives.sort().values
    below, upto = (torch.searchsorted(ordered, positives.contiguous(), right=right) for right in (False, True))
    return float((below + upto).double().mean() / (2 * len(negatives)))


def false_open_at_99(positives: Tensor, negatives: Tensor) -> float:
    """Returns the share of negatives at or above the score that 99 % of the positives reach, in [0, 1]."""
    return float((negatives >= positives.quantile(_REACHED, interpolation="lower")).double().mean())
