"""cloneofsimo's order: tensors are numbered, and a walk over the host says which site each number is.

The walk visits every Linear below a module of the classes that the file names, in the order of registration. diffusers
once registered a transformer block's parts as attn1, ff, attn2 and now as attn1, attn2, ff; files of both ages exist,
and the shapes tell them apart.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from safegen.errors import FormatError, NoMatchingSiteError, SafegenError, ShapeMismatchError
from safegen.membrane.delta import Site, check_fits
from safegen.membrane.layouts import file_key
from safegen.membrane.weights import Factor

_BLOCK = ".transformer_blocks."
_FORMER = {"attn1": 0, "ff": 1, "attn2": 2}
_RENAMED = {"CrossAttention", "Attention"}  # one class, before and after diffusers 0.12


@dataclass(frozen=True, slots=True)
class Host:
    """The model that a file was made for.

    Attributes:
        denoiser: The module that the walk visits.
        sites: Its sites by qualified name, in the order of registration (`Sites.modules`).
    """

    denoiser: nn.Module
    sites: Mapping[str, Site]


def classes_of(metadata: Mapping[str, str], component: str) -> frozenset[str]:
    """Returns the classes below which the walk looks, from a file's metadata.

    Raises:
        FormatError: They are not there.
    """
    try:
        found: Any = json.loads(metadata.get(component, ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        raise FormatError(
            f"metadata {component!r} is {metadata.get(component, '')[:80]!r}; expected a JSON list of the classes "
            "whose layers the numbers count"
        )
    classes = frozenset(str(name) for name in found)
    return classes | _RENAMED if classes & _RENAMED else classes


def place_in_order(factors: Mapping[str, Factor], classes: frozenset[str], host: Host) -> dict[str, str]:
    """Finds the site of every number.

    Args:
        factors: By number, as text.
        classes: From `classes_of`.
        host: The model that the file was made for.

    Returns:
        Site names by number.

    Raises:
        FormatError: A number is missing.
        NoMatchingSiteError: The walk finds another count of sites than the file has.
        ShapeMismatchError: The factors fit neither order, or both.
    """
    numbers = sorted(factors, key=int)
    gap = next((str(k) for k, number in enumerate(numbers) if int(number) != k), None)
    if gap is not None:
        raise FormatError(f"the file numbers {len(numbers)} sites and lacks number {gap}; expected 0 and up, no gaps")
    now = [name for name in host.sites if _counted(name, classes, host)]
    if len(now) != len(numbers):
        raise NoMatchingSiteError(
            f"the file numbers {len(numbers)} sites; the walk over this model's {', '.join(sorted(classes))} counts "
            f"{len(now)}. It was made for another base model."
        )
    orders = {tuple(order): _misfit(order, numbers, factors, host) for order in (now, _former(now))}
    fitting = [order for order, fault in orders.items() if fault is None]
    if len(fitting) > 1:
        raise ShapeMismatchError("the numbers fit this model in two orders; which one the file has cannot be told")
    if not fitting:
        raise next(fault for fault in orders.values() if fault is not None)
    return dict(zip(numbers, fitting[0], strict=True))


def _counted(name: str, classes: frozenset[str], host: Host) -> bool:
    parents = itertools.accumulate(name.split(".")[:-1], lambda path, part: f"{path}.{part}")
    inside = any(type(host.denoiser.get_submodule(path)).__name__ in classes for path in parents)
    return inside and isinstance(host.sites[name], nn.Linear)


def _former(names: Sequence[str]) -> list[str]:
    def block(name: str) -> str:
        head, found, rest = name.partition(_BLOCK)
        return head + found + rest.split(".")[0]

    def rank(name: str) -> int:
        parts = name.partition(_BLOCK)[2].split(".")
        return _FORMER.get(parts[1], len(_FORMER)) if len(parts) > 1 else 0

    groups = itertools.groupby(names, block)
    return [name for _, group in groups for name in sorted(group, key=rank)]


def _misfit(
    order: Sequence[str], numbers: Sequence[str], factors: Mapping[str, Factor], host: Host
) -> SafegenError | None:
    for name, number in zip(order, numbers, strict=True):
        try:
            check_fits(name, host.sites[name], factors[number])
        except ShapeMismatchError as error:
            return ShapeMismatchError(f"number {number} of the file: {error}")
    return None


def by_file_key(factors: Mapping[str, Factor], placed: Mapping[str, str]) -> tuple[dict[str, Factor], dict[str, str]]:
    """Returns the factors by file key, and the site name of each key, both in alphabetical order."""
    names = {file_key(name): name for name in placed.values()}
    numbers = {name: number for number, name in placed.items()}
    return {key: factors[numbers[name]] for key, name in sorted(names.items())}, dict(sorted(names.items()))
