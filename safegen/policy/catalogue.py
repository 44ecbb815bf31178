"""The concept catalogue: what concepts are called, in several languages, and where their names mean something else.

A catalogue is a folder of YAML files (`policies/concepts/`). Each file belongs to a collection: `world` holds concepts
of the world, `mini` the stand-ins that safegen-mini can draw. Rules may name any concept by id; a `<category>/*` rule
takes the world only, so that a policy written for real models does not start refusing "ghost".

The name of a concept is a phrase like its aliases and counts wherever it stands in a prompt. So it must be
unambiguous: "The Incredible Hulk", not "Hulk". Where an unambiguous phrase has harmless uses, `benign` lists them: a
phrase found inside one of those does not count. `neighbours` are no phrases to look for but prompts to keep: what is
close to the concept and may be drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StrictBool, field_validator
from pydantic_core import PydanticCustomError

from safegen.errors import PolicyNotFoundError, PolicyValidationError, Problem
from safegen.policy.compiled import read_compiled
from safegen.policy.concept_check import Owners, phrase_faults
from safegen.policy.document import Document, read_document
from safegen.policy.faults import in_document_order, validate
from safegen.policy.fields import Category, Kebab, Strict, spelled, within
from safegen.resources import shipped
from safegen.text import normalise

Phrase = Annotated[str, Field(min_length=1, max_length=200)]
Language = Annotated[str, spelled(r"[a-z]{2}(-[A-Za-z]{2,4})?", "a language code (like pt or zh-TW)")]

# ISO 639-1, the two-letter codes of languages, by their first letter. "jp", "cn" and the like are countries.
_SECOND_LETTERS = {
    "a": "abefkmnrsvyz", "b": "aegimnors", "c": "aehorsuvy", "d": "aevz", "e": "elnostu", "f": "afijory",
    "g": "adlnuv", "h": "aeiortuyz", "i": "adegikostu", "j": "av", "k": "agijklmnorsuvwy", "l": "abginotuv",
    "m": "ghiklnrsty", "n": "abdeglnorvy", "o": "cjmrs", "p": "ailst", "q": "u", "r": "mnouw",
    "s": "acdegiklmnoqrstuvw", "t": "aeghiklnorstwy", "u": "gkrz", "v": "eio", "w": "ao", "x": "h", "y": "io",
    "z": "ahu",
}  # fmt: skip


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
        neighbours: What is close to the concept and must still be drawn ("a marble statue"); calibrations hold the
            gate shut on them, evaluations draw them.
    """

    id: Kebab
    name: Phrase
    category: Category
    living: StrictBool | None = None
    aliases: tuple[Phrase, ...] = ()
    languages: Mapping[Language, tuple[Phrase, ...]] = {}
    benign: tuple[Phrase, ...] = ()
    neighbours: tuple[Phrase, ...] = ()

    @field_validator("name", "aliases", "benign", "neighbours")
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
        sources: Where the names come from, and what they were checked against; for those who review the file.
        concepts: At least one.
    """

    apiVersion: Literal["safegen.dev/v1"]  # noqa: N815 - the document's own spelling, as in Kubernetes
    kind: Literal["Concepts"]
    collection: Literal["world", "mini"]
    sources: Annotated[tuple[Phrase, ...], Field(min_length=1)]
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
        folders: Folders of `*.yaml` files, read in order; the shipped catalogue if none is given (read once, and
            without the checks between phrases, which its tests make).

    Returns:
        The concepts of all files together.

    Raises:
        PolicyNotFoundError: A folder holds no concept file.
        PolicySyntaxError: A file is not YAML, or YAML that safegen refuses.
        PolicyValidationError: Faults in the content; `problems` lists those of all files.
    """
    return _read(folders, phrases=True) if folders else _shipped_catalogue()


@cache
def _shipped_catalogue() -> Catalogue:
    folder = shipped("policies") / "concepts"
    compiled = read_compiled(folder)
    if not compiled or compiled.keys() != {path.name for path in folder.glob("*.yaml")}:
        return _read((folder,), phrases=False)
    return _together([ConceptFile.model_validate(content) for content in compiled.values()])


def _read(folders: tuple[Path, ...], *, phrases: bool) -> Catalogue:
    contents: list[ConceptFile] = []
    problems: list[Problem] = []
    origin: dict[str, str] = {}
    owners: dict[str, Owners] = {"world": {}, "mini": {}}
    for folder in folders:
        paths = sorted(folder.glob("*.yaml"))
        if not paths:
            raise PolicyNotFoundError(f"{folder}: no concept file (*.yaml) here")
        for path in paths:
            document = read_document(path)
            content, faults = validate(ConceptFile, document)
            if content is not None:
                faults += _file_faults(content, document, origin)
                if phrases:
                    faults += _phrase_faults(content, document, owners[content.collection])
                contents.append(content)
            problems += in_document_order(faults)
    if problems:
        raise PolicyValidationError(problems)
    return _together(contents)


def _together(contents: Sequence[ConceptFile]) -> Catalogue:
    concepts = [(concept, content.collection) for content in contents for concept in content.concepts]
    return Catalogue(
        {concept.id: concept for concept, _ in concepts},
        frozenset(concept.id for concept, collection in concepts if collection == "world"),
    )


def _phrase_faults(content: ConceptFile, document: Document, owners: Owners) -> Iterator[Problem]:
    for index, concept in enumerate(content.concepts):
        yield from phrase_faults(concept, ("concepts", index), document, owners)


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
        for code in concept.languages:
            if code[1] not in _SECOND_LETTERS.get(code[0], ""):
                text = f"unknown language {code!r}; expected a code of ISO 639-1 (ja for Japanese, zh for Chinese)"
                faults.append(document.problem(("concepts", index, "languages", code), text, key=True))
    return faults
