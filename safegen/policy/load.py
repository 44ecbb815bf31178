"""Policies by name or path, read with all that they extend and with every fault at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safegen.errors import PolicyNotFoundError, PolicyValidationError, Problem, did_you_mean
from safegen.policy.catalogue import Catalogue, load_catalogue
from safegen.policy.consistency import consistency_faults, entries, texts
from safegen.policy.document import Document, Loc, read_document
from safegen.policy.extend import MAX_DEPTH, MAX_FILES, MAX_PARENTS, NoParent, laid_over, locate
from safegen.policy.faults import in_document_order, validate
from safegen.policy.fields import within
from safegen.policy.schema import Policy, Rule
from safegen.policy.tighten import Looser, looser
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


def policy_files(name_or_path: str | Path) -> list[Path]:
    """Returns the policy files that a name, a file or a folder stands for; of a folder, those that are no tests.

    Raises:
        PolicyNotFoundError: No such policy, or a folder without one.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        return [find_policy(name_or_path)]
    found = sorted(one for one in path.glob("*.yaml") if not one.name.endswith(".policytest.yaml"))
    if not found:
        raise PolicyNotFoundError(f"{path}: expected policy files (*.yaml) in this folder, found none; name a file")
    return found


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
    policy, problems = check_policy(find_policy(name_or_path), catalogue=catalogue)
    if problems or policy is None:
        raise PolicyValidationError(problems)
    return policy


def check_policy(path: Path, *, catalogue: Catalogue | None = None) -> tuple[Policy | None, tuple[Problem, ...]]:
    """Reads a policy file with all that it extends, and lists the faults of all these files.

    Args:
        path: The file.
        catalogue: The concepts that rules may name; the shipped catalogue by default.

    Returns:
        The policy, or None where it is not fit to be looked at further, and its faults in document order.

    Raises:
        PolicyNotFoundError: The file cannot be read.
        PolicySyntaxError: It, or one that it extends, is not YAML, or YAML that safegen refuses.
    """
    layer = _Reader(catalogue or load_catalogue()).read(path, ())
    return layer.policy, in_document_order(layer.problems)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One file, laid over those that it extends."""

    document: Document
    policy: Policy | None
    problems: list[Problem]


class _Reader:
    """Reads one policy and its parents, each file once."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._read: dict[Path, _Layer] = {}

    def read(self, path: Path, below: tuple[Path, ...]) -> _Layer:
        """Reads a file; `below` are those that led to it, outermost first."""
        key = path.resolve()
        if key not in self._read:
            self._read[key] = self._fresh(path, (*below, key))
        return self._read[key]

    def _fresh(self, path: Path, chain: tuple[Path, ...]) -> _Layer:
        document = read_document(path)
        parents, problems = self._parents(document, path, chain)
        merged = laid_over([parent.document for parent in parents], document)
        policy, faults = validate(Policy, merged)
        own = [*problems, *faults]
        told = {fault.where for fault in own}
        own += [fault for fault in _other_faults(merged, self._catalogue) if fault.where not in told]
        if (
            policy is not None
            and not own
            and all(parent.policy is not None and not parent.problems for parent in parents)
        ):
            bases = [parent.policy for parent in parents if parent.policy is not None]
            overrides = [text for base in bases for text in base.overrides]
            for base in bases:
                policy.read_from(merged.values, ())
                own += self._looser(base, policy, merged, overrides)
            policy.read_from(merged.values, tuple(dict.fromkeys(overrides)))
        return _Layer(merged, policy, [*own, *(fault for parent in parents for fault in parent.problems)])

    def _parents(self, document: Document, path: Path, chain: tuple[Path, ...]) -> tuple[list[_Layer], list[Problem]]:
        given: Any = cast("dict[str, Any]", document.value).get("extends") if isinstance(document.value, dict) else None
        shipped_files = {name: shipped("policies") / f"{name}.yaml" for name in shipped_policies()}
        layers: list[_Layer] = []
        problems: list[Problem] = []
        for k, entry in enumerate(texts(given)[:MAX_PARENTS]):
            loc: Loc = ("extends", k) if isinstance(given, list) else ("extends",)
            try:
                parent = locate(entry, path, shipped_files)
                self._check_chain(parent, chain)
                layers.append(self.read(parent, chain))
            except NoParent as error:
                problems.append(document.problem(loc, f"extends: {error}"))
        return layers, problems

    def _check_chain(self, parent: Path, chain: tuple[Path, ...]) -> None:
        key = parent.resolve()
        if key in chain:
            circle = " → ".join(one.name for one in (*chain[chain.index(key) :], key))
            raise NoParent(f"a circle: {circle}; a policy cannot extend itself")
        if len(chain) > MAX_DEPTH:
            raise NoParent(f"policies extend one another more than {MAX_DEPTH} deep; lay some of them together")
        if len(self._read) + len(chain) > MAX_FILES:
            raise NoParent(f"more than {MAX_FILES} files are extended in all; lay some of them together")

    def _looser(self, base: Policy, policy: Policy, document: Document, overrides: list[str]) -> Iterator[Problem]:
        """Yields where a policy is looser than its parent without saying so, and notes what it overrides."""
        for one in looser(base, policy, self._catalogue):
            by = policy.exceptions[one.exception] if one.exception is not None else self._speaker(policy, one)
            if by.override:
                overrides.append(f"{policy.where(one.loc)}: {one.message}; overridden: {by.reason}")
                continue
            text = f"{one.message}; what extends a policy is at least as strict: correct it, or state override: true"
            with_reason = "" if one.exception is not None else " and a reason"
            where = "in this exception" if one.exception is not None else _where(policy, one)
            yield document.problem(one.loc, f"{text}{with_reason} {where}")

    @staticmethod
    def _speaker(policy: Policy, one: Looser) -> Policy | Rule:
        """Returns what may override a setting: the rule, where the rule states it, else the policy."""
        return policy.rules[one.rule] if one.rule is not None and one.loc[0] == "rules" else policy


def _where(policy: Policy, one: Looser) -> str:
    if one.rule is not None and one.loc[0] == "rules":
        return f"in rule {policy.rules[one.rule].id!r}"
    return "at the top of the file"


def _other_faults(document: Document, catalogue: Catalogue) -> Iterator[Problem]:
    """Yields the faults that the model cannot see: those between fields, and of concepts that the catalogue lacks."""
    if isinstance(document.value, dict):
        content = cast("dict[str, Any]", document.value)
        yield from (document.problem(loc, message) for loc, message in consistency_faults(content))
        yield from _concept_faults(content, document, catalogue)


def _concept_faults(content: dict[str, Any], document: Document, catalogue: Catalogue) -> Iterator[Problem]:
    """Yields a problem for each rule or exception whose concept the catalogue does not know, or knows otherwise."""
    concepts: dict[str, str] = {}
    for index, rule in entries(content, "rules"):
        name, category = rule.get("concept"), rule.get("category")
        if not isinstance(name, str):
            continue
        if isinstance(rule.get("id"), str):
            concepts[rule["id"]] = name
        selected = catalogue.select(name)
        if not selected:
            groups = wildcards(catalogue)
            known = groups if "/" in name or f"{name}/*" in groups else catalogue.concepts
            yield document.problem(("rules", index, "concept"), f"unknown concept {name!r}.{did_you_mean(name, known)}")
            continue
        group = name.removesuffix("/*") if name.endswith("/*") else selected[0].category
        if isinstance(category, str) and not within(category, "custom") and not within(group, category):
            message = f"concept {name!r} is of category {group}, not {category}; correct one of the two"
            yield document.problem(("rules", index, "category"), message)
    for index, exception in entries(content, "exceptions"):
        for k, target in enumerate(texts(exception.get("rules"))):
            rule, _, concept = target.partition("/")
            inside = {one.id for one in catalogue.select(concepts.get(rule, ""))}
            if concept and rule in concepts and (concept not in inside or not concepts[rule].endswith("/*")):
                hint = did_you_mean(concept, inside) if concepts[rule].endswith("/*") else f" Write {rule!r}."
                message = f"rule {rule!r} has no concept {concept!r} of its own.{hint}"
                yield document.problem(("exceptions", index, "rules", k), message)


def wildcards(catalogue: Catalogue) -> set[str]:
    """Returns every `<category>/*` that takes a concept, branches and what they branch off."""
    found: set[str] = set()
    for name in catalogue.world:
        parts = catalogue.concepts[name].category.split("/")
        found |= {"/".join(parts[:k]) + "/*" for k in range(1, len(parts) + 1)}
    return found
