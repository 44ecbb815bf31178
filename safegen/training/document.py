"""The recipe document: what to erase, from which model, how; read as strictly as a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from safegen.errors import PolicyError, RecipeError, did_you_mean
from safegen.policy.document import read_document
from safegen.policy.faults import in_document_order, validate
from safegen.policy.schema import Kebab, Metadata, Strict
from safegen.resources import shipped
from safegen.training.config import Settings, Template
from safegen.training.presets import Application, Family, Method, preset

_Name = Annotated[str, Field(min_length=1, max_length=200)]


class Erased(Strict):
    """One concept of a recipe.

    Attributes:
        concept: Concept id. Names and prompts that are not given below come from the concept catalogue.
        targets: Names to erase, the main one first.
        surrogate: What the concept turns into; empty: what remains of a prompt once the name is taken out.
        templates: Prompts around the name, each with what remains of it.
        neighbours: Names of what must not be taken for it.
    """

    concept: Kebab
    targets: tuple[_Name, ...] = ()
    surrogate: str = ""
    templates: tuple[Template, ...] = ()
    neighbours: tuple[_Name, ...] = ()


class Recipe(Strict):
    """One training, as a document.

    Attributes:
        apiVersion: Version of this schema.
        kind: Always `Recipe`.
        metadata: Which recipe this is.
        model: The image model: "mini", a pipeline folder, or a hub id.
        revision: Pinned commit of a hub id.
        family: Base family of that model, whose preset is taken; another one found there is refused.
        application: What kind of thing is erased: chooses the preset, and the prompts around a name.
        method: Whose settings: our own, or the paper's.
        concepts: What is erased; several are trained in one run, on the same anchors.
        pool: File of captions that anchors are drawn from, relative to the recipe; without one, the default captions.
        settings: What differs from the presets.
    """

    apiVersion: Literal["safegen.dev/v1"]  # noqa: N815 - the document's own spelling, as in Kubernetes
    kind: Literal["Recipe"]
    metadata: Metadata
    model: _Name
    revision: _Name | None = None
    family: Family
    application: Application
    method: Method = "ours"
    concepts: Annotated[tuple[Erased, ...], Field(min_length=1)]
    pool: _Name | None = None
    settings: Settings = Settings()

    def chosen(self, method: Method | None = None, **given: object) -> dict[str, object]:
        """Returns the settings: the preset's, over them the recipe's, over them those given here.

        Args:
            method: In place of the recipe's own.
            **given: Settings; None keeps what the recipe says.
        """
        stated = self.settings.model_dump(exclude_unset=True)
        over = {name: value for name, value in given.items() if value is not None}
        return {**preset(self.family, self.application, method or self.method), **stated, **over}


def find_recipe(name_or_path: str) -> Path:
    """Finds a recipe: a path, or the name of one that travels with safegen ("sd1/van-gogh").

    Raises:
        RecipeError: Neither exists; the message suggests a shipped name.
    """
    path, folder = Path(name_or_path), shipped("membranes") / "recipes"
    if path.is_file():
        return path
    names = [found.relative_to(folder).with_suffix("").as_posix() for found in sorted(folder.glob("*/*.yaml"))]
    if name_or_path in names:
        return folder / f"{name_or_path}.yaml"
    raise RecipeError(f"{name_or_path}: neither a file nor a shipped recipe.{did_you_mean(name_or_path, names)}")


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        RecipeError: No such file, not YAML, YAML that safegen refuses, or faults in the content, all at once.
    """
    try:
        document = read_document(path)
    except PolicyError as error:
        raise RecipeError(str(error)) from error
    recipe, problems = validate(Recipe, document)
    ids = [erased.concept for erased in recipe.concepts] if recipe else []
    for index, concept in enumerate(ids):
        if concept in ids[:index]:
            problems.append(document.problem(("concepts", index, "concept"), f"concept {concept!r} is there already"))
    if problems or recipe is None:
        raise RecipeError("\n".join(str(problem) for problem in in_document_order(problems)))
    return recipe
