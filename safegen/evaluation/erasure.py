"""What membranes do on safegen-mini: prompts that name a concept, its neighbours, the rest, scenes; before and after.

The judge is independent (`safegen.mini.judge`): neither gates nor trainings use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from safegen.mini import captions, zoo
from safegen.mini.catalogue import OBJECTS, STYLES, Object, Style
from safegen.mini.examine import draw_images
from safegen.mini.judge import Judge

Group = Literal["target", "neighbour", "unrelated"]
NEAREST = 5  # neighbours that the text encoder names; the concept catalogue names more

_SHIPPED = tuple(zoo.find(concept) for concept in zoo.CONCEPTS)
# Prompts that are not about a shipped concept name none of them either.
_FREE_OBJECTS = tuple(o for o in OBJECTS if o not in _SHIPPED)
_FREE_STYLES = tuple(s for s in STYLES if s not in _SHIPPED)


@dataclass(frozen=True, slots=True)
class Case:
    """One image to draw and judge.

    Attributes:
        concept: Catalogue id of the concept that the case is about.
        group: Whether the prompt names the concept, a neighbour of it, or neither.
        prompt: The prompt.
        object: Object that the prompt asks for; None where it names none.
        style: Style that the prompt asks for; None where it names none.
    """

    concept: str
    group: Group
    prompt: str
    object: str | None
    style: str | None


def neighbours(pipe: Any, concept: str) -> tuple[str, ...]:
    """Returns the names of what is close to a concept: objects for an object, styles for a style.

    First the five nearest by the text encoder (cosine of the mean hidden states of the bare names, less that of the
    empty prompt), then those of the concept catalogue, named by hand. Other shipped concepts are never among them.
    """
    entry = zoo.find(concept)
    pool: Sequence[Object | Style] = _FREE_OBJECTS if isinstance(entry, Object) else _FREE_STYLES
    pool = [other for other in pool if other is not entry]
    names = [entry.name, *(other.name for other in pool), ""]
    ids = pipe.tokenizer(names, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(ids)[0].mean(dim=1)
    states = states - states[-1]
    cosines = torch.nn.functional.cosine_similarity(states[1:-1], states[:1])
    nearest = cosines.argsort(descending=True)[:NEAREST].tolist()
    return tuple(dict.fromkeys((*(pool[k].name for k in nearest), *zoo.alike(concept))))


def unrelated_objects(pipe: Any) -> tuple[Object, ...]:
    """Returns the objects that are neither shipped concepts nor neighbours of one."""
    near = {name for concept in zoo.CONCEPTS for name in neighbours(pipe, concept)}
    return tuple(item for item in _FREE_OBJECTS if item.name not in near)


def _pick(pool: Sequence[Any], rng: np.random.Generator) -> Any:
    return pool[int(rng.integers(len(pool)))]


def _object_case(concept: str, group: Group, item: Object, rng: np.random.Generator) -> Case:
    if rng.random() < 1 / 3:
        return Case(concept, group, captions.bare(item, rng), item.name, None)
    style: Style = _pick(_FREE_STYLES, rng)
    return Case(concept, group, captions.styled(item, style, rng), item.name, style.name)


def _style_case(concept: str, group: Group, style: Style, rng: np.random.Generator) -> Case:
    item: Object = _pick(_FREE_OBJECTS, rng)
    return Case(concept, group, captions.styled(item, style, rng), item.name, style.name)


def cases(pipe: Any, concept: str, group: Group, count: int, *, seed: int) -> list[Case]:
    """Returns the prompts of one group, captioned as people prompt (templates, synonyms, with and without a style).

    Unrelated prompts keep away from all shipped concepts and from the neighbours of all of them; they name no style,
    since every style is a neighbour of the shipped ones.

    Args:
        pipe: safegen-mini; its text encoder says what is near.
        concept: Catalogue id of a concept of `zoo.PLANNED`.
        group: Which prompts.
        count: How many.
        seed: Seed of the choice of captions.
    """
    rng = np.random.default_rng([seed, zoo.PLANNED.index(concept), ["target", "neighbour", "unrelated"].index(group)])
    entry = zoo.find(concept)
    near, far = neighbours(pipe, concept), unrelated_objects(pipe)
    found: list[Case] = []
    for k in range(count):
        if group == "target":
            case = _object_case if isinstance(entry, Object) else _style_case
            found.append(case(concept, group, entry, rng))  # pyright: ignore[reportArgumentType]
        elif group == "neighbour" and isinstance(entry, Object):
            found.append(_object_case(concept, group, _named(OBJECTS, near[k % len(near)]), rng))
        elif group == "neighbour":
            found.append(_style_case(concept, group, _named(STYLES, near[k % len(near)]), rng))
        else:
            item: Object = _pick(far, rng)
            found.append(Case(concept, group, captions.bare(item, rng), item.name, None))
    return found


def _named(pool: Sequence[Any], name: str) -> Any:
    return next(entry for entry in pool if entry.name == name)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Images of some cases, and what the judge saw in them.

    Attributes:
        cases: What was asked.
        images: What was drawn.
        objects: The judge's object of each image.
        styles: The judge's style of each image.
    """

    cases: tuple[Case, ...]
    images: tuple[Image.Image, ...]
    objects: tuple[str, ...]
    styles: tuple[str, ...]

    def hits(self, concept: str) -> list[bool]:
        """Tells for each image whether the judge takes it for the concept (object or style)."""
        entry = zoo.find(concept)
        seen = self.objects if isinstance(entry, Object) else self.styles
        return [name == entry.name for name in seen]

    def right(self) -> list[bool]:
        """Tells for each image whether the judge sees what its prompt asks for: the object, and the style if named."""
        return [
            case.object in (None, item) and case.style in (None, style)
            for case, item, style in zip(self.cases, self.objects, self.styles, strict=True)
        ]

    def judged_as(self, concept: str) -> float:
        """Share of the images that the judge takes for the concept (object or style)."""
        return sum(self.hits(concept)) / len(self.cases)

    def accuracy(self) -> float:
        """Share of the images in which the judge sees what the prompt asks for: the object, and the style if named."""
        return sum(self.right()) / len(self.cases)


def draw_cases(pipe: Any, judge: Judge, asked: Sequence[Case], *, seed: int, label: str) -> Drawn:
    """Draws and judges cases; image k starts from the noise of seed `seed + k`, so that two calls can be compared."""
    images = draw_images(pipe, [case.prompt for case in asked], seed=seed, label=label)
    seen = judge.pictures(images)
    return Drawn(tuple(asked), tuple(images), seen.objects, seen.styles)


def identical(before: Drawn, after: Drawn) -> list[bool]:
    """Tells for each image whether it is the same in both, bit for bit."""
    return [a.tobytes() == b.tobytes() for a, b in zip(before.images, after.images, strict=True)]


@dataclass(frozen=True, slots=True)
class Scene:
    """Two objects side by side to draw and judge.

    Attributes:
        prompt: The prompt.
        target: The object that a shipped concept names.
        other: The object beside it, which no shipped concept names.
    """

    prompt: str
    target: str
    other: str


def scenes(concept: str, count: int, *, seed: int) -> list[Scene]:
    """Returns prompts of two objects, the concept's own left or right, captioned as people prompt.

    Args:
        concept: Catalogue id of a shipped object.
        count: How many.
        seed: Seed of the choice.
    """
    rng = np.random.default_rng([seed, zoo.PLANNED.index(concept), 3])
    target = _named(OBJECTS, zoo.find(concept).name)
    found: list[Scene] = []
    for _ in range(count):
        other: Object = _pick(_FREE_OBJECTS, rng)
        sides = (target, other) if rng.random() < 0.5 else (other, target)
        found.append(Scene(captions.scene(*sides, _pick(_FREE_STYLES, rng), rng), target.name, other.name))
    return found


@dataclass(frozen=True, slots=True)
class DrawnScenes:
    """Images of scenes, and the objects that the judge saw in their two halves."""

    asked: tuple[Scene, ...]
    seen: tuple[frozenset[str], ...]

    def target_seen(self) -> float:
        """Share of the images in which the judge sees the target, left or right."""
        return sum(scene.target in seen for scene, seen in zip(self.asked, self.seen, strict=True)) / len(self.asked)

    def other_seen(self) -> float:
        """Share of the images in which the judge sees the other object, left or right."""
        return sum(scene.other in seen for scene, seen in zip(self.asked, self.seen, strict=True)) / len(self.asked)


def draw_scenes(pipe: Any, judge: Judge, asked: Sequence[Scene], *, seed: int, label: str) -> DrawnScenes:
    """Draws scenes and judges each half; image k starts from the noise of seed `seed + k`."""
    images = draw_images(pipe, [scene.prompt for scene in asked], seed=seed, label=label)
    left, right = judge.halves(images)
    return DrawnScenes(tuple(asked), tuple(map(frozenset, zip(left.objects, right.objects, strict=True))))
