"""Faults between the phrases of a catalogue: a name of two concepts, an idle guard, a neighbour that is a name.

They need every phrase compiled, so the shipped catalogue is checked by its tests, and a caller's own folders whenever
they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from safegen.errors import Problem
from safegen.policy.document import Document, Loc
from safegen.text import Match, PhraseMatcher, letters, normalise

if TYPE_CHECKING:
    from safegen.policy.catalogue import Concept

Owners = dict[str, tuple[str, str]]
"""Concept id and place of a phrase, by its letters."""


def phrase_faults(concept: Concept, loc: Loc, document: Document, owners: Owners) -> Iterator[Problem]:
    """Yields the faults of one concept's phrases.

    Args:
        concept: The concept.
        loc: Where it stands in the document.
        document: The document.
        owners: The phrases of the collection's concepts before it; takes this one's.

    Yields:
        A problem for each phrase that another concept has too, each that never counts because a benign phrase holds
        it, each benign phrase that holds none, and each neighbour that names the concept.
    """
    places = _places(concept, loc)
    names, excuses = PhraseMatcher(places), PhraseMatcher(concept.benign)
    for phrase, place in places.items():
        problem = document.problem(place, "")
        other, where = owners.setdefault(_letters(phrase), (concept.id, problem.where))
        if other != concept.id:
            text = f"phrase {phrase!r} is a name of concept {other!r} too ({where}); keep it in one of the two"
            yield Problem(problem.where, text)
        if not _counted(phrase, names, excuses):
            text = f"phrase {phrase!r} stands in a benign phrase of its own concept, so it never counts; remove one"
            yield Problem(problem.where, text)
    for k, phrase in enumerate(concept.benign):
        if not names.find(phrase):
            text = f"benign phrase {phrase!r} holds no phrase of concept {concept.id!r}, so it excuses nothing"
            yield document.problem((*loc, "benign", k), f"{text}; remove or correct it")
    for k, phrase in enumerate(concept.neighbours):
        for found in _counted(phrase, names, excuses)[:1]:
            text = f"neighbour {phrase!r} names concept {concept.id!r} ({found.phrase!r})"
            yield document.problem(
                (*loc, "neighbours", k), f"{text}; expected what must still be drawn: reword it, or make it benign"
            )


def _places(concept: Concept, loc: Loc) -> Mapping[str, Loc]:
    """Returns where each phrase of a concept stands first."""
    listed: list[tuple[str, Loc]] = [(concept.name, (*loc, "name"))]
    listed += [(phrase, (*loc, "aliases", k)) for k, phrase in enumerate(concept.aliases)]
    for code, phrases in concept.languages.items():
        listed += [(phrase, (*loc, "languages", code, k)) for k, phrase in enumerate(phrases)]
    return dict(reversed(listed))


def _counted(text: str, names: PhraseMatcher, excuses: PhraseMatcher) -> list[Match]:
    excused = excuses.find(text)
    return [match for match in names.find(text) if not any(match.inside(other) for other in excused)]


def _letters(phrase: str) -> str:
    plain = normalise(phrase)
    return "".join(plain[k] for k in letters(plain, "plain"))
