"""Two objects in one picture, one of them erased: does a membrane do better if it acts on the words' own tokens only?

    python benchmarks/scenes.py [--json] [--scenes 100] [--concept robot …]

Draws scenes of a shipped object and another one, and prompts of the shipped object alone, from the same seeds: by the
base model (the peer), with the membrane open everywhere (`plain`, what safegen does), and with the variants that
docs/decisions/0015 weighs. The independent judge looks at both halves of a scene and at the whole. Exit code 1 if
`plain` misses a floor.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from floors import Floor, command, console, finish
from PIL.Image import Image
from rich.table import Table
from torch import Tensor, nn

from safegen import mini
from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.backend.sites import plan
from safegen.bundle.store import MEMBRANE_FILE
from safegen.evaluation.erasure import Scene, cases, scenes
from safegen.membrane.delta import project
from safegen.membrane.file import read_membrane
from safegen.membrane.weights import Factor, Membrane
from safegen.mini import zoo
from safegen.mini.catalogue import OBJECT_NAMES, Object
from safegen.mini.examine import BATCH, draw_images
from safegen.mini.judge import Judge
from safegen.resources import shipped

# The model draws two objects weakly: the judge's first five names for a picture tell more than its first alone.
LIKELY = 5
_ON_TEXT = (".attn2.to_k", ".attn2.to_v")


@dataclass(frozen=True, slots=True)
class Variant:
    """Where a membrane acts, and how strongly.

    Attributes:
        tokens: Text positions at which it acts on keys and values: all, those of the words that name the concept, or
            those and the end token with all that follows it (a causal encoder says there what the prompt is about).
        elsewhere: Whether it acts at the other sites, which see no text.
        strength: Factor on it.
    """

    tokens: Literal["all", "named", "named and end"] = "all"
    elsewhere: bool = True
    strength: float = 1.0


VARIANTS = {
    "plain": Variant(),
    "plain, strength 1.5": Variant(strength=1.5),
    "tokens": Variant("named"),
    "tokens, strength 1.5": Variant("named", strength=1.5),  # a mask weakens a membrane; this makes up for it
    "tokens and end": Variant("named and end"),
    "tokens and end, other sites closed": Variant("named and end", elsewhere=False),
}


def positions(backend: Backend, prompt: str, concept: str, variant: Variant) -> Tensor:
    """Returns where a variant acts on the text of a prompt that names the concept: 0 or 1, [tokens]."""
    length = backend.tokenise([prompt]).shape[1]
    if variant.tokens == "all":
        return torch.ones(length)
    entry = zoo.find(concept)
    assert isinstance(entry, Object)
    names = (entry.name, *entry.synonyms)
    spans = [(k, k + len(name)) for name in names if (k := prompt.find(name)) >= 0]
    if not spans:
        raise ValueError(f"{prompt!r} names no {entry.name!r}")
    tokens = backend.tokens(prompt)
    acts = torch.zeros(length)
    for k, token in enumerate(tokens, start=1):  # after the begin token
        acts[k] = any(token.start < end and start < token.end for start, end in spans)
    if variant.tokens == "named and end":
        acts[len(tokens) + 1 :] = 1
    return acts


def _hook(name: str, factor: Factor, variant: Variant, acts: Tensor) -> Callable[..., Tensor]:
    def add(module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        half = len(y) // 2  # with guidance, diffusers puts the unconditional rows first
        h = variant.strength * factor.scale * project(module, inputs[0][half:], factor.down)
        if name.endswith(_ON_TEXT):
            h = h * acts[:, :, None]
        delta = F.linear(h, factor.up) if isinstance(module, nn.Linear) else F.conv2d(h, factor.up)
        return torch.cat([y[:half], y[half:] + delta])

    return add


@contextmanager
def opened(backend: Backend, membrane: Membrane, variant: Variant, prompts: Sequence[str]) -> Generator[None]:
    """Opens a membrane on the conditional rows of one batch, as a variant says."""
    acts = torch.stack([positions(backend, prompt, membrane.concept, variant) for prompt in prompts])
    handles = [
        backend.sites.modules[name].register_forward_hook(_hook(name, membrane.factors[key], variant, acts))
        for key, name in plan(membrane, backend.sites, backend.family).items()
        if variant.elsewhere or name.endswith(_ON_TEXT)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def draw(pipe: Any, membrane: Membrane, variant: Variant | None, prompts: Sequence[str], *, seed: int) -> list[Image]:
    """Draws prompts, with the membrane open as a variant says or (None) without it."""
    backend, images = backend_of(pipe), list[Image]()
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        if variant is None:
            images += draw_images(pipe, part, seed=seed + start)
        else:
            with opened(backend, membrane, variant, part):
                images += draw_images(pipe, part, seed=seed + start)
    return images


def seen(judge: Judge, images: list[Image], likely: int) -> list[set[str]]:
    """Returns for each picture the objects that the judge names first (the first `likely` names) in any look at it.

    It looks at the left half, at the right half, and at the whole: what is left alone may move to the middle.
    """
    found: list[set[str]] = [set() for _ in images]
    for verdicts in (*judge.halves(images), judge.pictures(images)):
        for names, row in zip(found, verdicts.object_probability.topk(likely).indices.tolist(), strict=True):
            names.update(OBJECT_NAMES[k] for k in row)
    return found


def figures(judge: Judge, asked: Sequence[Scene], images: list[Image], alone: list[Image]) -> dict[str, float]:
    """Returns the shares of what was seen of one variant."""
    first, likely = seen(judge, images, 1), seen(judge, images, LIKELY)

    def share(found: list[set[str]], names: list[str]) -> float:
        return sum(name in names_seen for name, names_seen in zip(names, found, strict=True)) / len(asked)

    targets, others = [scene.target for scene in asked], [scene.other for scene in asked]
    objects = judge.pictures(alone).objects
    return {
        "erased object seen": share(first, targets),
        "other object seen": share(first, others),
        f"erased object among the first {LIKELY}": share(likely, targets),
        f"other object among the first {LIKELY}": share(likely, others),
        "alone, judged as the target": sum(name == asked[0].target for name in objects) / len(alone),
    }


class Bench:
    """Draws the scenes of one concept without its membrane, then with each variant of it."""

    def __init__(self, pipe: Any, judge: Judge, concept: str, count: int) -> None:
        self._pipe, self._judge = pipe, judge
        self._membrane = read_membrane(shipped("membranes") / "mini" / concept / MEMBRANE_FILE)
        self._asked = scenes(concept, count, seed=2)
        self._alone = [case.prompt for case in cases(pipe, concept, "target", -(-count // 2), seed=5)]

    def under(self, variant: Variant | None) -> dict[str, float]:
        """Draws and judges everything for one variant; None for the base model."""
        images = draw(self._pipe, self._membrane, variant, [scene.prompt for scene in self._asked], seed=80_000)
        alone = draw(self._pipe, self._membrane, variant, self._alone, seed=60_000)
        return figures(self._judge, self._asked, images, alone)


def mean(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean over concepts of each figure; all concepts have as many scenes."""
    return {key: sum(one[key] for one in found) / len(found) for key in found[0]}


def ratios(base: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Returns what became of the base model's own rates.

    Where the base model's rate is 0 nothing can be shown: that counts as not gone, and as not kept.
    """

    def left(key: str, unknown: float) -> float:
        return after[key] / base[key] if base[key] else unknown

    return {
        "erased object gone": 1 - left("erased object seen", 1.0),
        f"gone, first {LIKELY}": 1 - left(f"erased object among the first {LIKELY}", 1.0),
        "other object kept": left("other object seen", 0.0),
        f"kept, first {LIKELY}": left(f"other object among the first {LIKELY}", 0.0),
        "alone, judged as the target": after["alone, judged as the target"],
    }


def table(title: str, seen_by: dict[str, dict[str, float]]) -> Table:
    """Returns the variants side by side, as ratios to `base`."""
    found = {name: ratios(seen_by["base"], one) for name, one in seen_by.items() if name != "base"}
    result = Table(title=title)
    for heading in ("", *next(iter(found.values()))):
        result.add_column(heading)
    for name, one in found.items():
        result.add_row(name, *(f"{value:.1%}" for value in one.values()))
    return result


def floors_of(shown: dict[str, float]) -> list[Floor]:
    """Returns what is demanded of `plain`, from its ratios over all concepts."""
    return [
        Floor.at_least("plain: erased object gone", shown["erased object gone"], 0.9),
        Floor.at_least("plain: other object kept, of its base rate", shown["other object kept"], 0.85),
        Floor.at_most("plain: alone, judged as the target", shown["alone, judged as the target"], 0.1),
    ]


def measure(concepts: Sequence[str], variants: Sequence[str], count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the shares that were seen, by concept and by variant; the variant `base` is the model alone."""
    pipe, judge = mini.load(), mini.load_judge()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for concept in concepts:
        bench = Bench(pipe, judge, concept, count)
        found[concept] = {"base": bench.under(None)} | {name: bench.under(VARIANTS[name]) for name in variants}
        console.print(table(concept, found[concept]))
    return found


def known(given: Sequence[str] | None, allowed: Sequence[str], option: str) -> tuple[str, ...]:
    """Returns what was chosen of an option's values; all by default.

    Raises:
        typer.BadParameter: One is not among them.
    """
    for name in given or ():
        if name not in allowed:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(allowed)}", param_hint=option)
    return tuple(given or allowed)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    count: Annotated[int, typer.Option("--scenes", min=1, help="Scenes per concept; half as many alone.")] = 100,
    concept: Annotated[list[str] | None, typer.Option(help="Objects; all shipped ones by default.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Variants beside plain; all by default.")] = None,
) -> None:
    """Measures what is left of both objects when one is erased, for each place where its membrane can act."""
    objects = [name for name in zoo.CONCEPTS if isinstance(zoo.find(name), Object)]
    variants = tuple(dict.fromkeys(("plain", *known(variant, tuple(VARIANTS), "--variant"))))
    found = measure(known(concept, objects, "--concept"), variants, count)
    overall = {name: mean([one[name] for one in found.values()]) for name in ("base", *variants)}
    if len(found) > 1:
        console.print(table("all", overall))
    floors = floors_of(ratios(overall["base"], overall["plain"]))
    report = {
        "benchmark": "Scenes of two objects",
        "command": command(__file__),
        "model": "safegen-mini",
        "peer": "the base model, drawn in the same run",
        "scenes_per_concept": count,
        "threads": torch.get_num_threads(),
        "results": {
            f"{name}: {figure}": {"before": before, "after": overall[name][figure]}
            for name in variants
            for figure, before in overall["base"].items()
        },
        "by_concept": found,
    }
    finish(report, floors, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
