"""Renders docs/results.md from benchmarks/results/*.json, and the README's figures.

    python benchmarks/report.py

Each result is what a benchmark prints with `--json`: facts (`benchmark`, `command`, `model`, …), `floors`, and
`results` or `peers` (by name: a number, or shares before and after).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safegen.mini import zoo
from safegen.mini.membrane_card import Figures, read_figures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
BEGIN = "<!-- figures: written by benchmarks/report.py -->"
END = "<!-- end of figures -->"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float) -> str:
    """Returns a number without noise: four digits after the point at most."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def floors_table(floors: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of what was demanded, with what was found."""
    rows = [
        [
            f["name"],
            number(f["value"]),
            f"{f.get('bound', '')} {number(f['floor'])}",
            "holds" if f["holds"] else "**MISSED**",
        ]
        for f in floors
    ]
    return table(("what", "measured", "floor", ""), rows)


def results_table(results: Mapping[str, Any]) -> str:
    """Returns the table of figures: shares before and after, and plain numbers."""
    rows: list[list[str]] = []
    for name, value in results.items():
        if isinstance(value, Mapping):
            rows.append([name, f"{value['before']:.1%}", f"{value['after']:.1%}"])
        else:
            rows.append([name, number(value), ""])
    return table(("figure", "before", "after"), rows)


def section(report: Mapping[str, Any]) -> str:
    """Returns the section of one benchmark: its facts, what was demanded, what was found."""
    missed = sum(not floor["holds"] for floor in report["floors"])
    verdict = f"{missed} of {len(report['floors'])} floors are missed" if missed else "Every floor holds"
    facts = [
        f"{key.replace('_', ' ')} {value}" for key, value in report.items() if isinstance(value, str | int | float)
    ]
    parts = [f"## {report['benchmark']}", f"**{verdict}.** {'; '.join(facts[1:])}.", floors_table(report["floors"])]
    parts += [results_table(report[key]) for key in ("results", "peers") if key in report]
    return "\n\n".join(parts) + "\n"


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """Returns docs/results.md."""
    head = "# Results\n\nWritten by `python benchmarks/report.py` from `benchmarks/results/`; do not edit it by hand.\n"
    return "\n".join([head, *map(section, reports)])


def read_reports() -> list[dict[str, Any]]:
    """Returns the committed results, by file name; a benchmark that does not name itself is called by its file."""
    paths = sorted(RESULTS.glob("*.json"))
    return [{"benchmark": path.stem} | json.loads(path.read_text("utf-8")) for path in paths]


def _change(figures: Figures, group: str) -> str:
    before, after = figures[group]
    return f"{before:.1%} → {after:.1%}"


def readme_figures() -> str:
    """Returns the README's figures of the embedded model and of the shipped membranes."""
    model = json.loads((ROOT / "safegen" / "mini" / "weights" / "figures.json").read_text("utf-8"))
    measured = {concept: read_figures(ROOT / "membranes" / "mini" / concept) for concept in zoo.CONCEPTS}
    images = min(figures["images"] for figures in measured.values())
    groups = ("target", "neighbour", "unrelated")
    rows = [[f"`{name}`", *(_change(figures, group) for group in groups)] for name, figures in measured.items()]
    titles = ("membrane", "judged as the target", "neighbours drawn as asked", "the rest drawn as asked")
    examined = f"python -m safegen.mini.examine --images {model['images']:.0f} --seed {model['seed']:.0f}"
    return f"""**The model** (`{examined}`):
object as asked {model["object"]:.1%}, style as asked {model["style"]:.1%},
object and style of pairs left out of training {model["held_out"]:.1%}.

**The membranes, forced open for every prompt** (γ = 1, no gate to hide behind; {images} images per figure,
`python -m safegen.mini.measure_zoo --images {images}`):

{table(titles, rows)}

{gates()}"""


def gates() -> str:
    """Returns the README's table of the gates, from what `benchmarks/transport.py --json` printed."""
    measured = json.loads((RESULTS / "transport.json").read_text("utf-8"))["gate"]
    rows: list[list[str]] = []
    for name, found in measured.items():
        ours, theirs = found["shipped"], found["published"]
        cells = [f"{ours['true-open']:.1%}", f"{ours['false-open']:.1%}", f"{ours['auroc']:.3f}"]
        cells += [f"{theirs['false-open, at least half']:.1%}", f"{theirs['auroc']:.3f}"]
        rows.append([f"`{name}`", str(found["prompts"]), *cells])
    titles = ("membrane", "prompts", "opens where named", "opens elsewhere", "AUROC")
    titles += ("published: half open elsewhere", "published: AUROC")
    return f"""**The gates**, on held-out prompts (`benchmarks/transport.py`): templates that no
calibration has seen, aliases, upper case, plurals, seven kinds of obfuscation; neighbours; unrelated prompts. Open is
γ ≥ 0.5, shut is γ = 0 exactly. Beside them the published gate (SPM), which has no threshold, on the same prompts:

{table(titles, rows)}"""


def readme_text() -> str:
    """Returns the README with its figures renewed."""
    text = README.read_text("utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{readme_figures()}\n{END}{tail}"


def main() -> None:
    """Writes docs/results.md, where there are results, and the README's figures."""
    if reports := read_reports():
        PAGE.write_text(page(reports), "utf-8")
    README.write_text(readme_text(), "utf-8")


if __name__ == "__main__":
    main()
