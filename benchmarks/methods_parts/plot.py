"""Erasure against preservation, one mark per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from methods_parts.summary import Line

# Okabe and Ito's palette, which people with any kind of colour blindness tell apart; shapes differ as well.
_COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000")
_SHAPES = "osD^vP*X<>hd"
_NOTES = {"inference": " (while drawing)", "gate": " (words only)"}


def draw(lines: Sequence[Line], path: Path, *, title: str) -> None:
    """Writes the plot: share of targets no longer seen against mean accuracy on everything else.

    Bars are 95 % Wilson intervals; upright, the mean of those of the two accuracies. Hollow marks act while drawing.

    Args:
        lines: One per method; all erased as many targets at once.
        path: File to write; its ending says the format.
        title: What was measured.
    """
    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "safegen"}):
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        axes = figure.add_subplot()
        for k, line in enumerate(lines):
            spread = [
                [line.target.high - line.target.value],
                [line.target.value - line.target.low],
            ]  # what is erased is 1 - seen, so that the ends change places
            below = line.kept - (line.neighbour.low + line.unrelated.low) / 2
            above = (line.neighbour.high + line.unrelated.high) / 2 - line.kept
            hollow = line.kind in _NOTES
            colour = _COLOURS[k % len(_COLOURS)]
            axes.errorbar(
                100 * (1 - line.target.value),
                100 * line.kept,
                xerr=[[100 * value for value in end] for end in spread],
                yerr=[[100 * below], [100 * above]],
                color=colour,
                ecolor="#BBBBBB",
                elinewidth=0.8,
                linestyle="none",
                marker=_SHAPES[k % len(_SHAPES)],
                markersize=13 - 0.6 * k,  # the later ones smaller, so that marks on one spot all show
                markerfacecolor="white" if hollow else colour,
                markeredgewidth=1.6,
                label=f"{line.method}{_NOTES.get(line.kind, '')}",
            )
        axes.set_xlabel("targets no longer seen (%)  →  erases better")
        axes.set_ylabel("neighbours and others as asked, mean (%)  →  keeps better")
        axes.set_xlim(-4, 104)
        axes.set_ylim(top=103)
        axes.grid(color="#EEEEEE")
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)
