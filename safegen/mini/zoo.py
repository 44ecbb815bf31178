"""The shipped membranes of safegen-mini: which concepts, what they are trained on, what is held against them.

`python -m safegen.mini.train_zoo` trains them, `python -m safegen.mini.measure_zoo` measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safegen.mini.catalogue import OBJECTS, STYLES, Object, Style, with_article
from safegen.policy.catalogue import load_catalogue
from safegen.transport.phrasing import STYLE, THING, around

CONCEPTS = ("ghost", "robot", "santa-claus", "popart", "blueprint", "bicycle")
"""The concepts whose membranes ship."""

PLANNED = (
    *CONCEPTS,
    *("ogre", "goblin", "clown", "fairy", "dragon", "unicorn", "ninja", "princess", "t-rex"),
    *("clay", "ink", "pixel"),
    *("guitar", "castle", "pizza", "cat", "rocket", "rose"),
)
"""What `train_zoo` trains: 12 characters, 5 styles and 7 objects, the shipped ones first."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the training of one concept needs beside the common settings.

    Attributes:
        concept: Catalogue id.
        targets: Names to erase.
        templates: Prompts around the name, each with what remains of it.
        pool: Captions that anchors are drawn from.
        neighbours: What is easily taken for the concept, named by hand: held in place in the concept's own prompts.
    """

    concept: str
    targets: tuple[str, ...]
    templates: tuple[tuple[str, str], ...]
    pool: tuple[str, ...]
    neighbours: tuple[str, ...] = ()


def find(concept: str) -> Object | Style:
    """Returns the catalogue entry of a concept id."""
    for entry in (*OBJECTS, *STYLES):
        if entry.name.replace(" ", "-") == concept:
            return entry
    raise KeyError(concept)


def alike(concept: str) -> tuple[str, ...]:
    """Returns what a person might take for a concept of safegen-mini, or what looks alike: the catalogue's neighbours.

    They are named by hand, since the text encoder knows words and not looks. None of a shipped concept's is shipped
    itself: where all membranes are installed, those are erased too.
    """
    return load_catalogue().concepts[concept].neighbours


def near(concept: str) -> list[str]:
    """Returns prompts of what is `alike` to a concept, worded as its own are."""
    names = alike(concept)
    wording = STYLE if isinstance(find(concept), Style) else THING
    templates = (*wording, *(template for template, _ in plan(concept).templates))
    return around((*names, *(f"a {name}" for name in names)), templates)


def _object_captions(item: Object, styles: Sequence[Style]) -> list[str]:
    name = with_article(item.name)
    return [name, item.name, *(f"{name} in the style of {style.name}" for style in styles)]


def plan(concept: str) -> Plan:
    """Returns the plan of a concept of the catalogue: an object's or a style's."""
    entry = find(concept)
    return _object_plan(concept, entry) if isinstance(entry, Object) else _style_plan(concept, entry)


def _object_plan(concept: str, item: Object) -> Plan:
    a = with_article("{}") if with_article(item.name) != item.name else "{}"
    templates = [("{}", ""), (a, ""), (f"an emoji of {a}", ""), (f"a picture of {a}", ""), (f"draw {a}", "")]
    for style in STYLES:
        templates.append((f"{a} in the style of {style.name}", f"in the style of {style.name}"))
        templates += [(p.format("{}", a=a), f"{style.name} style") for p in style.phrases]
    others = [o for o in OBJECTS if o is not item]
    pool = [text for other in others for text in _object_captions(other, STYLES)]
    pool += [f"in the style of {style.name}" for style in STYLES] * 8
    pool += [f"{with_article(a.name)} and {with_article(b.name)}" for a, b in zip(others, others[37:], strict=False)]
    return Plan(concept, (item.name, *item.synonyms), tuple(templates), tuple(pool), alike(concept))


def _style_plan(concept: str, style: Style) -> Plan:
    templates: list[tuple[str, str]] = [("{} style", ""), ("in the style of {}", "")]
    for item in OBJECTS[::4]:
        name = with_article(item.name)
        templates += [(f"{name} in the style of {{}}", name), (f"{{}} style {item.name}", item.name)]
        templates.append((f"an emoji of {name} in the style of {{}}", f"an emoji of {name}"))
        templates += [(p.format(item.name, a=name).replace(style.name, "{}"), name) for p in style.phrases]
    others = [s for s in STYLES if s is not style]
    pool = [text for item in OBJECTS for text in _object_captions(item, others)]
    pool += [f"in the style of {other.name}" for other in others] * 20
    return Plan(concept, (style.name,), tuple(templates), tuple(pool), alike(concept))
