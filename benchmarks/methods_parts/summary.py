"""From the results of single comparisons to one line per method: tables, floors, and the figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from floors import Floor
from report import table

from safegen.evaluation.metrics.shares import Share

OURS = "safegen"
RELEASED = "spm-as-released"
ESD = ("esd-x", "esd-u")


@dataclass(frozen=True, slots=True)
class Line:
    """One method over all sets of targets of one size, and all seeds.

    Attributes:
        method: Its name.
        kind: How it acts; `Kind` of safegen.evaluation.methods.
        targets: Targets erased at once.
        before: Images of targets judged as their target, base model.
        target: The same, erased.
        neighbour: Accuracy on neighbours, erased.
        unrelated: Accuracy on unrelated prompts, erased.
        lost: Points lost on neighbours and on unrelated prompts, as shares.
        drift: Mean Fréchet distance between judge features of non-targets before and after.
        pixels: Mean share of pixels unchanged on unrelated prompts.
        identical: Mean share of images bit-identical on unrelated prompts.
        speed: Mean of SPEED's harmonic mean.
        mace: Mean of MACE's; None where it is not defined.
        seconds: Mean seconds to make the eraser.
        cpu_seconds: The same in CPU time.
        peak_mb: Highest peak memory while it was made.
        stored: Mean bytes stored.
        cells: Comparisons that it rests on.
    """

    method: str
    kind: str
    targets: int
    before: Share
    target: Share
    neighbour: Share
    unrelated: Share
    lost: tuple[float, float]
    drift: float
    pixels: float
    identical: float
    speed: float
    mace: float | None
    seconds: float
    cpu_seconds: float
    peak_mb: float
    stored: float
    cells: int

    @property
    def kept(self) -> float:
        """Mean of the accuracies on neighbours and on unrelated prompts."""
        return (self.neighbour.value + self.unrelated.value) / 2


def _pooled(cells: Sequence[dict[str, Any]], group: str, when: str) -> Share:
    shares = [cell["figures"][group][when] for cell in cells]
    return Share.of(round(sum(s["value"] * s["images"] for s in shares)), sum(s["images"] for s in shares))


def lines(cells: Sequence[dict[str, Any]]) -> list[Line]:
    """Returns one line per method and number of targets, in the order of the cells."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], len(cell["targets"])), []).append(cell)
    return [_line(method, count, found) for (method, count), found in groups.items()]


def _line(method: str, count: int, cells: Sequence[dict[str, Any]]) -> Line:
    def mean(part: str, name: str) -> float:
        return fmean(cell[part][name] for cell in cells)

    after = {group: _pooled(cells, group, "after") for group in ("target", "neighbour", "unrelated")}
    lost = [_pooled(cells, group, "before").value - after[group].value for group in ("neighbour", "unrelated")]
    maces = [cell["figures"]["mace"] for cell in cells if cell["figures"]["mace"] is not None]
    return Line(
        method=method,
        kind=cells[0]["kind"],
        targets=count,
        before=_pooled(cells, "target", "before"),
        **after,
        lost=(lost[0], lost[1]),
        drift=mean("figures", "drift"),
        pixels=mean("figures", "unchanged_pixels"),
        identical=mean("figures", "identical"),
        speed=mean("figures", "speed"),
        mace=fmean(maces) if maces else None,
        seconds=mean("cost", "seconds"),
        cpu_seconds=mean("cost", "cpu_seconds"),
        peak_mb=max(cell["cost"]["peak_mb"] for cell in cells),
        stored=mean("cost", "stored"),
        cells=len(cells),
    )


def _percent(share: Share) -> str:
    return f"{share.value:.1%} [{100 * share.low:.0f}–{100 * share.high:.0f}]"


def markdown(found: Sequence[Line]) -> str:
    """Returns the comparison as a Markdown table; shares with their 95 % Wilson intervals."""
    titles = (
        "method", "kind", "targets", "target seen ↓", "neighbours ↑", "others ↑", "drift ↓", "pixels unchanged ↑",
        "images identical ↑", "H (SPEED) ↑", "H (MACE) ↑", "seconds", "CPU seconds", "peak MB", "stored KB",
    )  # fmt: skip
    rows = [
        [
            line.method,
            line.kind,
            str(line.targets),
            _percent(line.target),
            _percent(line.neighbour),
            _percent(line.unrelated),
            f"{line.drift:.2f}",
            f"{line.pixels:.1%}",
            f"{line.identical:.1%}",
            f"{line.speed:.3f}",
            "" if line.mace is None else f"{line.mace:.3f}",
            f"{line.seconds:.0f}",
            f"{line.cpu_seconds:.0f}",
            f"{line.peak_mb:.0f}",
            f"{line.stored / 1e3:.0f}",
        ]
        for line in found
    ]
    return table(titles, rows)


def results(found: Sequence[Line]) -> dict[str, Any]:
    """Returns the main figures as benchmarks/report.py tabulates them: shares before and after, and numbers."""
    flat: dict[str, Any] = {}
    for line in found:
        label = f"{line.method}, {line.targets} at once" if line.targets > 1 else line.method
        flat[f"{label}: target seen"] = {"before": line.before.value, "after": line.target.value}
        groups = ("neighbours", line.neighbour), ("others", line.unrelated)
        for (group, after), lost in zip(groups, line.lost, strict=True):
            flat[f"{label}: {group}"] = {"before": after.value + lost, "after": after.value}
        flat[f"{label}: drift of non-targets"] = line.drift
    return flat


def floors(found: Sequence[Line], targets: int, seeds: int) -> list[Floor]:
    """Returns what issue 5 demands of the shipped recipe, over the targets that were erased one at a time.

    A floor that needs a method which was not run is left out. Gates, which only look at the prompt's words, are no
    peer: the shipped membranes are measured without theirs.
    """
    single = {line.method: line for line in found if line.targets == 1}
    ours = single.get(OURS)
    demanded = [
        Floor.at_least("targets", targets, 8),
        Floor.at_least("seeds", seeds, 3),
    ]
    if ours is None:
        return demanded
    demanded += [
        Floor.at_least("safegen: target seen, before", ours.before.value, 0.9),
        Floor.at_most("safegen: target seen, after", ours.target.value, 0.05),
        Floor.at_most("safegen: neighbours lost", ours.lost[0], 0.02),
        Floor.at_most("safegen: others lost", ours.lost[1], 0.005),
    ]
    esd = [single[name].drift for name in ESD if name in single]
    if esd:
        demanded.append(Floor.at_most("safegen: drift against the smaller of ESD's", ours.drift / min(esd), 1 / 3))
    if RELEASED in single:
        ratio = ours.drift / single[RELEASED].drift
        demanded.append(Floor.at_most("safegen: drift against SPM as released", ratio, 0.5))
    rivals = [
        line
        for line in single.values()
        if line.method != OURS and line.kind not in ("none", "gate") and line.target.value <= ours.target.value
    ]
    if rivals:
        best = max(rivals, key=lambda line: line.kept)
        name = f"safegen: kept more than the best that erases as much ({best.method})"
        demanded.append(Floor.at_least(name, ours.kept - best.kept, 0.0))
    return demanded
