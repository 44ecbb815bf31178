"""What a calibration says: from which score on a membrane opens, measured on which encoder, and how well that tells.

Calibrations travel in a membrane file's metadata, under `METADATA_KEY`, as a JSON list. Thresholds hold for the encoder
that they were measured with, and for no other: scores of two encoders are not comparable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from safegen.errors import FormatError
from safegen.transport.curve import Curve

METADATA_KEY = "safegen.calibration"
GRADED = ("direction", "paper", "semantic")
"""Scores that need thresholds; the others are 0 or 1."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The thresholds of one score, as measured on one encoder.

    Attributes:
        score: Which score, out of `GRADED`.
        encoder: Fingerprint of the encoder (`TextReader.fingerprint`).
        lo: Below it the membrane is exactly shut, in [-1, 1].
        hi: From it on it is fully open, in [lo, 1].
        auroc: Share of the pairs of a positive and a negative in which the positive scores higher, ties counted half.
        false_open_at_99: Share of the negatives at or above the score that 99 % of the positives reach.
        positives: How many prompts that name the concept were scored.
        negatives: How many that do not.
    """

    score: str
    encoder: str
    lo: float
    hi: float
    auroc: float
    false_open_at_99: float
    positives: int
    negatives: int

    def __post_init__(self) -> None:
        numbers = (self.lo, self.hi, self.auroc, self.false_open_at_99)
        sound = all(math.isfinite(number) for number in numbers) and -1 <= self.lo <= self.hi <= 1
        sound = sound and 0 <= self.auroc <= 1 and 0 <= self.false_open_at_99 <= 1
        if self.score not in GRADED or not sound or not self.encoder or min(self.positives, self.negatives) < 1:
            raise FormatError(
                f"calibration {asdict(self)}: expected one of the scores {', '.join(GRADED)}, an encoder, "
                "-1 <= lo <= hi <= 1, shares in [0, 1] and counts of at least 1; run `safegen calibrate` again"
            )

    @property
    def curve(self) -> Curve:
        """The curve with these thresholds."""
        return Curve(self.lo, self.hi)


def parse(metadata: Mapping[str, str]) -> tuple[Calibration, ...]:
    """Reads the calibrations in a membrane's metadata; empty where it carries none.

    Raises:
        FormatError: They cannot be read, or hold values that no calibration gives.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return ()
    try:
        return tuple(_one(entry) for entry in json.loads(text))
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"{METADATA_KEY} in its metadata cannot be read ({error}); run `safegen calibrate` again"
        ) from error


def _one(entry: Any) -> Calibration:
    kinds = {"score": str, "encoder": str, "positives": int, "negatives": int}
    values = {f.name: entry[f.name] for f in fields(Calibration) if f.name in entry}
    for name, value in values.items():
        if not isinstance(value, kinds.get(name, int | float)) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}")
    return Calibration(**values)


def text_of(calibrations: Sequence[Calibration]) -> str:
    """Returns the metadata's text for calibrations."""
    return json.dumps([asdict(one) for one in calibrations], sort_keys=True)


def section(calibrations: Sequence[Calibration]) -> str:
    """Returns the section of a membrane's card that states its calibrations, in Markdown."""
    rows = [
        f"| {c.score} | {c.lo:.4f} | {c.hi:.4f} | {c.auroc:.4f} | {c.false_open_at_99:.2%} "
        f"| {c.positives}, {c.negatives} | `{c.encoder[:19]}` |"
        for c in calibrations
    ]
    head = (
        "## Calibration\n\n"
        "Measured on prompts that name the concept and prompts that do not; the thresholds hold for the encoder named\n"
        "here and for no other (`safegen calibrate`).\n\n"
        "| score | shut below | fully open from | AUROC | false opening at 99 % true | prompts | encoder |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def merged(old: Sequence[Calibration], new: Sequence[Calibration]) -> tuple[Calibration, ...]:
    """Returns `old` with `new` in place of what was measured for the same score and encoder."""
    replaced = {(one.score, one.encoder) for one in new}
    return (*(one for one in old if (one.score, one.encoder) not in replaced), *new)


def found(calibrations: Sequence[Calibration], score: str, encoder: str) -> Calibration | None:
    """Returns the calibration of a score on an encoder; None where there is none."""
    return next((one for one in calibrations if (one.score, one.encoder) == (score, encoder)), None)
