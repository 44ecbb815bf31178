"""One run of `safegen train`: its settings, put together from options or from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegen.cli.train_plan import plan_for, plan_of, read_pool
from safegen.errors import UsageError
from safegen.mini.zoo import Plan

if TYPE_CHECKING:
    from safegen.training.config import TrainConfig
    from safegen.training.presets import Method


@dataclass(frozen=True, slots=True)
class Run:
    """What is trained together.

    Attributes:
        model: "mini", a pipeline folder, or a hub id.
        revision: Pinned commit of a hub id.
        family: Base family that the settings are for; None where nobody said.
        configs: Settings of each concept.
        pool: Captions that anchors are drawn from.
        captions: File that they come from, where they are not the default ones.
    """

    model: str
    revision: str | None
    family: str | None
    configs: tuple[TrainConfig, ...]
    pool: tuple[str, ...]
    captions: Path | None


def run_of_options(
    concept: str,
    target: Sequence[str],
    pool: Path | None,
    model: str,
    revision: str | None,
    surrogate: str | None,
    given: dict[str, Any],
) -> Run:
    """Puts a run of one concept together.

    Args:
        concept: Concept id.
        target: Names to erase in place of the concept's own.
        pool: File of captions in place of the default ones.
        model: "mini", a pipeline folder, or a hub id.
        revision: Pinned commit of a hub id.
        surrogate: What the concept turns into.
        given: Settings; None keeps the default.

    Raises:
        UsageError: Names or settings that cannot be used; all settings at once.
    """
    plan = plan_for(concept, target, pool, model)
    chosen = {key: value for key, value in given.items() if value is not None}
    return Run(model, revision, None, (_config(plan, surrogate or "", chosen),), plan.pool, pool)


def run_of_recipe(
    name: str, method: Method | None, model: str | None, revision: str | None, given: dict[str, Any]
) -> Run:
    """Puts the run of a recipe together.

    Args:
        name: The recipe: a path, or the name of a shipped one.
        method: In place of the recipe's own.
        model: In place of the recipe's own; then `revision` is its.
        revision: Pinned commit of a hub id.
        given: Settings that take the place of the recipe's; None keeps them.

    Raises:
        RecipeError: It cannot be read, or has faults.
        UsageError: Concepts or settings that cannot be used.
    """
    from safegen.training.document import find_recipe, load_recipe

    file = find_recipe(name)
    recipe = load_recipe(file)
    host = model or recipe.model
    plans = [plan_of(erased, recipe.application, host) for erased in recipe.concepts]
    captions = file.parent / recipe.pool if recipe.pool else None
    if captions is None:
        kept = [set(plan.pool) for plan in plans[1:]]
        pool = tuple(caption for caption in plans[0].pool if all(caption in other for other in kept))
    else:
        pool = read_pool(captions, [name for plan in plans for name in plan.targets])
    settings = recipe.chosen(method, **given)
    configs = [_config(plan, erased.surrogate, settings) for plan, erased in zip(plans, recipe.concepts, strict=True)]
    return Run(host, revision if model else recipe.revision, recipe.family, tuple(configs), pool, captions)


def _config(plan: Plan, surrogate: str, settings: dict[str, Any]) -> TrainConfig:
    from pydantic import ValidationError

    from safegen.training.config import TrainConfig

    try:
        return TrainConfig(
            concept=plan.concept,
            targets=plan.targets,
            templates=plan.templates,
            neighbours=plan.neighbours,
            surrogate=surrogate,
            **settings,
        )
    except ValidationError as error:
        faults = [
            f"--{str(fault['loc'][0]).replace('_', '-')} {fault['input']!r}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        ]
        raise UsageError("; ".join(faults)) from error
