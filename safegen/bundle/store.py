"""Membranes on disk: `<root>/<base family>/<concept id>/membrane.safetensors`, with a `card.md` beside each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safegen.errors import MembraneNotFoundError
from safegen.resources import shipped

MEMBRANE_FILE = "membrane.safetensors"


class MembraneStore:
    """Finds membrane files; earlier roots win over later ones, and the shipped membranes come last."""

    def __init__(self, roots: Sequence[Path] = ()) -> None:
        """Takes further folders of the same layout as the shipped one.

        Raises:
            MembraneNotFoundError: A root is not a folder.
        """
        for root in roots:
            if not root.is_dir():
                raise MembraneNotFoundError(
                    f"{root}: no such folder; expected <base family>/<concept id>/{MEMBRANE_FILE} below it"
                )
        self._roots = (*roots, shipped("membranes"))

    def installed(self, family: str) -> dict[str, Path]:
        """Returns the membrane file of every concept that has one for a base family, by concept id."""
        found: dict[str, Path] = {}
        for root in reversed(self._roots):
            found |= {concept: root / family / concept / MEMBRANE_FILE for concept in concepts_in(root, family)}
        return found


def concepts_in(root: Path, family: str) -> tuple[str, ...]:
    """Returns the ids of the concepts that have a membrane for a base family in one folder, sorted."""
    return tuple(sorted(path.parent.name for path in (root / family).glob(f"*/{MEMBRANE_FILE}")))
