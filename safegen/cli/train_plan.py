"""What a training needs beside its settings: names, prompts around them, captions to hold in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from safegen.cli.options import MINI
from safegen.cli.render import say
from safegen.errors import UsageError, did_you_mean
from safegen.mini import zoo
from safegen.mini.catalogue import OBJECT_NAMES, STYLE_NAMES
from safegen.mini.zoo import Plan
from safegen.policy.catalogue import Concept, load_catalogue
from safegen.text import PhraseMatcher
from safegen.training.document import Erased
from safegen.training.presets import Application
from safegen.transport.phrasing import EVERYDAY, STYLE, THING, around

_ALIASES = 3  # names of a concept that are trained on when the caller names none

_THING = (
    ("{}", ""),
    ("a photo of {}", "a photo"),
    ("a picture of {}", "a picture"),
    ("an image of {}", "an image"),
    ("a painting of {}", "a painting"),
    ("a drawing of {}", "a drawing"),
    ("a close-up of {}", "a close-up"),
)
_PICTURE = (
    ("{}", ""),
    ("a picture of {}", "a picture"),
    ("a print of {}", "a print"),
    ("a reproduction of {}", "a reproduction"),
    ("{} on a poster", "a poster"),
    ("{} on a wall", "a wall"),
)
_STYLE = (
    ("{}", ""),
    ("{} style", ""),
    ("in the style of {}", ""),
    ("a picture in the style of {}", "a picture"),
    ("a painting in the style of {}", "a painting"),
    ("a painting by {}", "a painting"),
    ("a landscape in the style of {}", "a landscape"),
    ("a portrait in the style of {}", "a portrait"),
)

_TEMPLATES: dict[Application, tuple[tuple[str, str], ...]] = {
    "object": _THING,
    "style": _STYLE,
    "explicit": _THING,
    "memorised": _PICTURE,
}


class Wording(NamedTuple):
    """Prompts to calibrate a membrane on.

    Attributes:
        positives: Prompts that name the concept.
        negatives: Prompts that do not.
        neighbours: More of these, of what a person might take for the concept.
    """

    positives: list[str]
    negatives: list[str]
    neighbours: list[str]


def plan_for(concept: str, targets: Sequence[str], pool: Path | None, model: str) -> Plan:
    """Returns the plan of a training.

    Args:
        concept: Concept id: of what safegen-mini draws where the model is mini, of the concept catalogue elsewhere.
        targets: Names to erase in place of the concept's own.
        pool: File of captions in place of the default ones.
        model: "mini", a pipeline folder, or a hub id.

    Raises:
        UsageError: An unknown concept, a blank name, or a pool that names nothing but targets.
        PromptsFileError: The pool cannot be read.
    """
    if any(not target.strip() for target in targets):
        raise UsageError("--target: a name to erase is blank; expected a name")
    plan = _mini_plan(concept) if model == MINI else _catalogue_plan(concept)
    names = tuple(targets) or plan.targets
    captions = plan.pool if pool is None else read_pool(pool, names)
    return replace(plan, targets=names, pool=captions)


def plan_of(erased: Erased, application: Application, model: str) -> Plan:
    """Returns the plan of one concept of a recipe; what it does not say comes from the catalogue.

    Raises:
        UsageError: No such concept, and no names to erase either.
    """
    known = _mini_concepts() if model == MINI else load_catalogue().concepts
    if erased.concept in known or not erased.targets:
        plan = plan_for(erased.concept, erased.targets, None, model)
    else:
        plan = Plan(erased.concept, erased.targets, _THING, _others(PhraseMatcher(erased.targets)))
    if erased.concept not in _mini_concepts() or model != MINI:
        plan = replace(plan, templates=_TEMPLATES[application])
    return replace(plan, templates=erased.templates or plan.templates, neighbours=erased.neighbours or plan.neighbours)


def calibration_prompts(concept: str, targets: Sequence[str], captions: Path | None, model: str) -> Wording:
    """Returns prompts that name a concept, and prompts that do not, to calibrate its membrane on.

    Args:
        concept: What the membrane erases; of the concept catalogue its aliases are names too.
        targets: The names that it was trained on.
        captions: File of captions in place of the default ones.
        model: "mini", a pipeline folder, or a hub id.

    Raises:
        UsageError: Captions that all name the concept.
        PromptsFileError: The captions cannot be read.
    """
    pool = read_pool(captions, targets) if captions is not None else ()
    if model == MINI and concept in _mini_concepts():
        plan = zoo.plan(concept)
        positives = around(targets, [prompt for prompt, _ in plan.templates])
        return Wording(positives, [*(pool or plan.pool), *EVERYDAY], zoo.near(concept))
    catalogue = load_catalogue()
    found = catalogue.concepts.get(concept)
    templates = STYLE if found is not None and found.category == "artist-style" else THING
    names = dict.fromkeys((*targets, *(found.aliases if found else ())))
    others = [c.name for c in catalogue.concepts.values() if found is None or c.category == found.category]
    close = around((*found.benign, *found.neighbours), templates[:3]) if found else []
    return Wording(around(tuple(names), templates), [*pool, *around(others, templates[:3]), *EVERYDAY], close)


def _mini_concepts() -> set[str]:
    return {name.replace(" ", "-") for name in (*OBJECT_NAMES, *STYLE_NAMES)}


def read_pool(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the captions of a file, save for those that name the concept.

    Raises:
        UsageError: All of them do.
        PromptsFileError: The file cannot be read.
    """
    from safegen.prompts import read_prompts

    captions = [row.text for row in read_prompts(file)]
    matcher = PhraseMatcher(names)
    kept = tuple(caption for caption in captions if not matcher.find(caption))
    if len(kept) < len(captions):
        say(f"{len(captions) - len(kept)} of {len(captions)} captions name the concept and are left out of the pool")
    if not kept:
        raise UsageError(f"{file}: every caption names the concept; expected captions of what must stay as it is")
    return kept


def _mini_plan(concept: str) -> Plan:
    known = _mini_concepts()
    if concept not in known:
        raise UsageError(
            f"--concept {concept}: the model mini draws nothing of that name.{did_you_mean(concept, known)}"
        )
    return zoo.plan(concept)


def _catalogue_plan(concept: str) -> Plan:
    catalogue = load_catalogue()
    found = catalogue.concepts.get(concept)
    if found is None:
        hint = did_you_mean(concept, catalogue.concepts)
        raise UsageError(f"--concept {concept}: the concept catalogue has none of that id.{hint}")
    templates = _STYLE if found.category == "artist-style" else _THING
    others = _others(PhraseMatcher(found.phrases), found)
    return Plan(concept, (found.name, *found.aliases)[:_ALIASES], templates, others)


def _others(matcher: PhraseMatcher, found: Concept | None = None) -> tuple[str, ...]:
    """Returns the names of the catalogue's other concepts, save for those in which the concept is named."""
    benign, close = (found.benign, found.neighbours) if found else ((), ())
    names = dict.fromkeys([*close, *(other.name for other in load_catalogue().concepts.values() if other is not found)])
    return tuple(name for name in names if name in benign or not matcher.find(name))
