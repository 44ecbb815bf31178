"""Erasing methods side by side on safegen-mini: what each erases, what it leaves alone, and what it costs.

    python benchmarks/methods.py [--json] [--targets ghost --targets ghost,robot] [--methods uce,esd-x] [--seeds 1]
                                 [--images 48] [--cache DIR] [--markdown FILE] [--plot FILE]

Every method gets the same targets, captions to keep, prompts, noise and judge. Adapters are open for every prompt
(γ = 1); `inference` methods act on every prompt while drawing, a `gate` only on prompts that name a target. With a
cache folder each comparison is kept when it is finished, and an interrupted run goes on. Exit code 1 if a floor is
missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from end_to_end import fingerprint
from floors import command, finish
from methods_parts import plot, summary
from methods_parts.cache import Cache, describe
from PIL import Image
from rich.console import Console

from safegen import mini
from safegen.errors import UsageError
from safegen.evaluation.erasure import Case, Drawn, Group, cases, draw_cases
from safegen.evaluation.methods import METHODS, Drawer, Method, Target, Task, find
from safegen.evaluation.methods.cost import make
from safegen.evaluation.metrics.figures import Comparison, figures
from safegen.mini import zoo
from safegen.mini.judge import Judge

TARGETS = ("ghost", "santa-claus", "bicycle")
console = Console(stderr=True)


def target_of(concept: str) -> Target:
    """Returns a concept of the embedded model as every method gets it; its anchor is what looks most like it."""
    plan = zoo.plan(concept)
    return Target(concept, plan.targets, plan.templates, anchor=zoo.alike(concept)[0])


def task_of(concepts: Sequence[str], seed: int) -> Task:
    """Returns the task of erasing concepts at once; captions of one target are not kept for another."""
    targets = tuple(target_of(concept) for concept in concepts)
    named = {name for target in targets for name in target.names}
    pools = dict.fromkeys(text for concept in concepts for text in zoo.plan(concept).pool)
    words = [text for text in pools if not any(f" {name} " in f" {text} " for name in named)]
    return Task(targets, tuple(words), seed)


@dataclass(frozen=True, slots=True)
class Compared:
    """One method, one set of targets, one seed."""

    method: Method
    concepts: tuple[str, ...]
    seed: int


class Bench:
    """Draws every case once with the base model, then under each method."""

    def __init__(self, pipe: Any, judge: Judge, cache: Cache, *, images: int) -> None:
        self._pipe, self._judge, self._cache, self._images = pipe, judge, cache, images
        self._print = fingerprint(pipe)

    def run(self, asked: Compared, effort: float) -> dict[str, Any]:
        """Returns the result of one comparison, from the cache where it is there."""
        method = asked.method.scaled(effort)
        what = {"method": describe(method), "targets": asked.concepts, **self._facts(asked.seed)}
        name = f"{method.name}-{'+'.join(asked.concepts)}-{asked.seed}"
        found = self._cache.result(name, what)
        if found is None:
            found = self._compare(method, asked)
            self._cache.keep(name, what, found)
        return found

    def _facts(self, seed: int) -> dict[str, Any]:
        return {"model": self._print, "images": self._images, "seed": seed, "torch": torch.__version__}

    def _compare(self, method: Method, asked: Compared) -> dict[str, Any]:
        task = task_of(asked.concepts, asked.seed)
        eraser, cost = make(method, self._pipe, task)
        each = -(-self._images // len(asked.concepts))
        plans: list[tuple[str, Group, list[Case]]] = [
            (concept, group, cases(self._pipe, concept, group, each, seed=100 + asked.seed))
            for group in ("target", "neighbour")
            for concept in asked.concepts
        ]
        first = asked.concepts[0]
        plans.append((first, "unrelated", cases(self._pipe, first, "unrelated", self._images, seed=100 + asked.seed)))
        before = [self._base(group, plan, asked.seed) for _, group, plan in plans]
        if method.kind == "none":
            after = before
        else:
            with eraser.on(self._pipe) as drawer:
                label = f"{method.name}: {'+'.join(asked.concepts)}"
                after = [self._draw(drawer, plan, asked.seed, label) for _, _, plan in plans]
        if fingerprint(self._pipe) != self._print:
            raise SystemExit(f"{method.name} left the pipeline changed; no figure after this one could be trusted")
        pairs = {
            group: [
                Comparison(concept, b, a)
                for (concept, of, _), b, a in zip(plans, before, after, strict=True)
                if of == group
            ]
            for group in ("target", "neighbour", "unrelated")
        }
        found = figures(self._judge, pairs["target"], pairs["neighbour"], pairs["unrelated"][0])
        return {
            "method": method.name,
            "kind": method.kind,
            "several": method.several,
            "settings": describe(method)["settings"],
            "targets": list(asked.concepts),
            "seed": asked.seed,
            "figures": asdict(found),
            "cost": asdict(cost),
        }

    def _draw(self, drawer: Drawer, plan: Sequence[Case], seed: int, label: str) -> Drawn:
        return draw_cases(drawer, self._judge, plan, seed=90_000 + 1_000 * seed, label=label)

    def _base(self, group: Group, plan: Sequence[Case], seed: int) -> Drawn:
        """Returns what the base model draws, from the cache where it is there."""
        what = {"prompts": [case.prompt for case in plan], **self._facts(seed)}
        name = f"images-{plan[0].concept}-{group}-{seed}"
        kept = self._cache.images(name, what)
        if kept is None:
            drawn = self._draw(self._pipe, plan, seed, f"base: {plan[0].concept} {group}")
            self._cache.keep_images(name, what, np.stack([np.asarray(image) for image in drawn.images]))
            return drawn
        images = [Image.fromarray(array) for array in kept]
        seen = self._judge.pictures(images)
        return Drawn(tuple(plan), tuple(images), seen.objects, seen.styles)


def sets_of(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Reads sets of targets.

    Raises:
        UsageError: A concept that the embedded model ships no membrane for.
    """
    found = [tuple(dict.fromkeys(text.split(","))) for text in texts]
    unknown = sorted({concept for each in found for concept in each} - set(zoo.CONCEPTS))
    if unknown:
        raise UsageError(f"no concept {', '.join(map(repr, unknown))} to erase; expected {', '.join(zoo.CONCEPTS)}")
    return found


def main(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    targets: Annotated[
        list[str] | None, typer.Option(help="Concepts to erase at once, by comma; repeat for further sets.")
    ] = None,
    methods: Annotated[str, typer.Option(help=f"By comma; all by default: {', '.join(METHODS)}.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 1,
    images: Annotated[int, typer.Option(min=2, help="Images per figure, set of targets and seed.")] = 48,
    effort: Annotated[float, typer.Option(min=0.0, help="Iterations of all trainings, multiplied.")] = 1.0,
    cache: Annotated[Path | None, typer.Option(help="Folder of finished comparisons.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="File for the Markdown table.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="File for the plot, one target at a time.")] = None,
) -> None:
    """Compares erasing methods."""
    chosen = find([name for name in methods.split(",") if name])
    sets = sets_of(targets or TARGETS)
    bench = Bench(mini.load(), mini.load_judge(), Cache(cache), images=images)
    found: list[dict[str, Any]] = []
    for method in chosen:
        for concepts in sets:
            for seed in range(seeds):
                found.append(bench.run(Compared(method, concepts, seed), effort))
                seen = found[-1]["figures"]["target"]["after"]["value"]
                console.print(f"{method.name}, {'+'.join(concepts)}, seed {seed}: target seen {seen:.1%}")
    lines = summary.lines(found)
    floors = summary.floors(lines, len({each for each in sets if len(each) == 1}), seeds)
    report = {
        "benchmark": "Erasing methods side by side",
        "command": command(__file__),
        "model": "safegen-mini",
        "peer": "all methods in the same run; the base model is drawn from the same noise",
        "images_per_figure": images,
        "seeds": seeds,
        "effort": effort,
        "threads": torch.get_num_threads(),
        "results": summary.results(lines),
        "comparisons": found,
    }
    text = summary.markdown(lines)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(text + "\n", "utf-8")
    if picture is not None:
        single = [line for line in lines if line.targets == 1]
        plot.draw(single, picture, title=f"safegen-mini, {len(sets)} sets of targets, {images} images a figure")
    console.print(text, soft_wrap=True, markup=False)
    finish(report, floors, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
