"""Policies by name or path, read with every fault at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from safegen.errors import PolicyNotFoundError, PolicyValidationError, Problem, did_you_mean
from safegen.policy.catalogue import Catalogue, load_catalogue
from safegen.policy.document import Document, read_document
from safegen.policy.faults import in_document_order, validate
from safegen.policy.schema import Policy, consistency_faults
from safegen.resources import shipped

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def shipped_policies() -> tuple[str, ...]:
    """Returns the names of the policies that travel with safegen, sorted."""
    paths = shipped("policies").glob("*.yaml")
    return tuple(sorted(path.stem for path in paths if not path.stem.endswith(".policytest")))


def find_policy(name_or_path: str | Path) -> Path:
    """Finds a policy file.

    A bare name (`strict`) is always the shipped policy, whatever lies in the working directory. `policies/strict.yaml`
    is that path where it exists, else the shipped policy of that file name, so that what the documentation shows works
    outside a checkout too.

    Args:
        name_or_path: Name of a shipped policy, or a path.

    Returns:
        The path of an existing file.

    Raises:
        PolicyNotFoundError: Neither exists; the message suggests a shipped name.
    """
    text, path = str(name_or_path), Path(name_or_path)
    if isinstance(name_or_path, str) and _NAME.fullmatch(text) and text in shipped_policies():
        return shipped("policies") / f"{text}.yaml"
    if path.is_file():
        return path
    if path.parent == Path("policies") and path.suffix == ".yaml" and path.stem in shipped_policies():
        return shipped("policies") / path.name
    what = "is a folder, not a policy file" if path.is_dir() else "neither a file nor a shipped policy"
    raise PolicyNotFoundError(f"{text}: {what}.{did_you_mean(path.stem, shipped_policies())}")


def load_policy(name_or_path: str | Path, *, catalogue: Catalogue | None = None) -> Policy:
    """Reads and checks a policy.

    Args:
        name_or_path: Name of a shipped policy, or a path.
        catalogue: The concepts that rules may name; the shipped catalogue by default.

    Returns:
        The policy.

    Raises:
        PolicyNotFoundError: No such policy.
        PolicySyntaxError: Not YAML, or YAML that safegen refuses.
        PolicyValidationError: Faults in the content; `problems` lists all, in document order.
    """
    document = read_document(find_policy(name_or_path))
    policy, problems = validate(Policy, document)
    if isinstance(document.value, dict):
        content = cast("dict[str, Any]", document.value)
        problems += [document.problem(loc, message) for loc, message in consistency_faults(content)]
        problems += _concept_faults(content, document, catalogue or load_catalogue())
    if problems or policy is None:
        raise PolicyValidationError(in_document_order(problems))
    return policy


def _concept_faults(content: dict[str, Any], document: Document, catalogue: Catalogue) -> Iterable[Problem]:
    """Yields a problem for each rule whose concept the catalogue does not know, or knows under another category."""
    rules: Any = content.get("rules")
    for index, rule in enumerate(cast("list[Any]", rules) if isinstance(rules, list) else []):
        if not isinstance(rule, dict):
            continue
        rule = cast("dict[str, Any]", rule)
        name, category = rule.get("concept"), rule.get("category")
        if not isinstance(name, str):
            continue
        selected = catalogue.select(name)
        if not selected:
            groups = {
                f"{concept.category}/*" for concept in catalogue.concepts.values() if concept.id in catalogue.world
            }
            known = groups if "/" in name or f"{name}/*" in groups else catalogue.concepts
            yield document.problem(("rules", index, "concept"), f"unknown concept {name!r}.{did_you_mean(name, known)}")
        elif isinstance(category, str) and category not in ("custom", selected[0].category):
            message = f"concept {name!r} is of category {selected[0].category}, not {category}; correct one of the two"
            yield document.problem(("rules", index, "category"), message)
