"""The concept catalogue: what concepts are called, in several languages, and where their names mean something else.

A catalogue is a folder of YAML files (`policies/concepts/`). Each file belongs to a collection: `world` holds concepts
of the world, `mini` the stand-ins that safegen-mini can draw. Rules may name any concept by id; a `<category>/*` rule
takes the world only, so that a policy written for real models does not start refusing "ghost".

The name of a concept is a phrase like its aliases and counts wherever it stands in a prompt. So it must be
unambiguous: "The Incredible Hulk", not "Hulk". Where an unambiguous phrase has harmless uses, `benign` lists them: a
phrase found inside one of those does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StrictBool, field_validator
from pydantic_core import PydanticCustomError

from safegen.errors import PolicyNotFoundError, PolicyValidationError, Problem
from safegen.policy.document import Document, read_document
from safegen.policy.faults import in_document_order, validate
from safegen.policy.fields import Category, Kebab, Strict, spelled, within
from safegen.resources import shipped
from safegen.text import normalise

Phrase = Annotated[str, Field(min_length=1, max_length=200)]
Language = Annotated[str, spelled(r"[a-z]{2,3}(-[A-Za-z]{2,4})?", "a language code (like pt or zh-TW)")]


class Concept(Strict):
    """One thing that can be named, drawn and erased.

    Attributes:
        id: Kebab case; names the membrane folder too.
        name: The canonical name; a phrase.
        category: What kind of thing it is.
        living: An artist who, as far as the authors know, is alive; stated for every world artist.
        aliases: Further phrases, in English or used across languages.
        languages: Phrases by language code.
        benign: Phrases in which a match does not count ("nude lipstick").
    """

    id: Kebab
    name: Phrase
    category: Category
    living: StrictBool | None = None
    aliases: tuple[Phrase, ...] = ()
    languages: Mapping[Language, tuple[Phrase, ...]] = {}
    benign: tuple[Phrase, ...] = ()

    @field_validator("name", "aliases", "benign")
    @classmethod
    def _check_phrases(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for phrase in (value,) if isinstance(value, str) else value:
            _check_phrase(phrase)
        return value

    @field_validator("languages")
    @classmethod
    def _check_languages(cls, value: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
        for phrases in value.values():
            for phrase in phrases:
                _check_phrase(phrase)
        return value

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every phrase that names the concept: name, aliases, then the languages in file order."""
        foreign = [phrase for phrases in self.languages.values() for phrase in phrases]
        return tuple(dict.fromkeys((self.name, *self.aliases, *foreign)))


def _check_phrase(phrase: str) -> None:
    if not any(letter.isalnum() for letter in normalise(phrase)):
        raise PydanticCustomError("phrase", "phrase {shown} has no letter or digit", {"shown": repr(phrase)})


class ConceptFile(Strict):
    """One file of the catalogue.

    Attributes:
        apiVersion: Version of this schema.
        kind: Always `Concepts`.
        collection: `world`, or `mini` for the stand-ins of safegen-mini, which no wildcard takes.
        concepts: At least one.
    """

    apiVersion: Literal["safegen.dev/v1"]  # noqa: N815 - the document's own spelling, as in Kubernetes
    kind: Literal["Concepts"]
    collection: Literal["world", "mini"]
    concepts: Annotated[tuple[Concept, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All known concepts.

    Attributes:
        concepts: By id, in file order.
        world: The ids that wildcards may take.
    """

    concepts: Mapping[str, Concept]
    world: frozenset[str]

    def select(self, concept: str) -> tuple[Concept, ...]:
        """Returns what a rule's `concept` names: one concept, or all world concepts of `<category>/*`; maybe none."""
        category, star, _ = concept.partition("/*")
        if star:
            return tuple(c for c in self.concepts.values() if within(c.category, category) and c.id in self.world)
        return (self.concepts[concept],) if concept in self.concepts else ()


def load_catalogue(*folders: Path) -> Catalogue:
    """Reads a concept catalogue.

    Args:
        folders: Folders of `*.yaml` files, read in order; the shipped catalogue if none is given (read once).

    Returns:
        The concepts of all files together.

    Raises:
        PolicyNotFoundError: A folder holds no concept file.
        PolicySyntaxError: A file is not YAML, or YAML that safegen refuses.
        PolicyValidationError: Faults in the content; `problems` lists those of all files.
    """
    return _read(folders) if folders else _shipped_catalogue()


@cache
def _shipped_catalogue() -> Catalogue:
    return _read((shipped("policies") / "concepts",))


def _read(folders: tuple[Path, ...]) -> Catalogue:
    concepts: dict[str, Concept] = {}
    world: set[str] = set()
    problems: list[Problem] = []
    origin: dict[str, str] = {}
    for folder in folders:
        paths = sorted(folder.glob("*.yaml"))
        if not paths:
            raise PolicyNotFoundError(f"{folder}: no concept file (*.yaml) here")
        for path in paths:
            document = read_document(path)
            content, faults = validate(ConceptFile, document)
            problems += in_document_order([*faults, *(_file_faults(content, document, origin) if content else ())])
            if content is not None:
                concepts |= {concept.id: concept for concept in content.concepts}
                world |= {concept.id for concept in content.concepts if content.collection == "world"}
    if problems:
        raise PolicyValidationError(problems)
    return Catalogue(concepts, frozenset(world))


def _file_faults(content: ConceptFile, document: Document, origin: dict[str, str]) -> list[Problem]:
    """Returns the faults between concepts, and notes in `origin` where each id stands."""
    faults: list[Problem] = []
    for index, concept in enumerate(content.concepts):
        here = ("concepts", index, "id")
        problem = document.problem(here, f"concept id {concept.id!r} is taken at {origin.get(concept.id)}")
        if concept.id in origin:
            faults.append(problem)
        origin.setdefault(concept.id, problem.where)
        artist = content.collection == "world" and within(concept.category, "artist-style")
        if artist != (concept.living is not None):
            expected = (
                "state `living: true` or `living: false`" if artist else "`living` is for artists only; remove it"
            )
            faults.append(document.problem(here, f"concept {concept.id!r}: {expected}"))
    return faults
