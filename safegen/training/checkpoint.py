"""Checkpoints of a training: written so that a stop leaves the old one or the new one, never half of one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safegen.errors import TrainingError
from safegen.files import write_atomically

_NAME = re.compile(r"step-(\d{8})\.pt")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: Where they are; nothing else is there.
        every: Iterations between two.
        keep: How many of the last ones stay.
    """

    folder: Path
    every: int = 100
    keep: int = 2

    def due(self, iteration: int) -> bool:
        """Tells whether one is written after an iteration (from 1)."""
        return iteration % self.every == 0

    def save(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Writes one, then removes those that are too many."""
        write_atomically(self.folder / f"step-{iteration:08d}.pt", lambda path: torch.save(dict(state), path))
        for path in self._found()[: -self.keep]:
            path.unlink()

    def load(self, digest: str) -> dict[str, Any] | None:
        """Reads the last one; None where there is none.

        Args:
            digest: The run's digest (`run_digest`), which the checkpoint must carry.

        Raises:
            TrainingError: It cannot be read, or belongs to a run with other settings, captions or another model.
        """
        found = self._found()
        if not found:
            return None
        path = found[-1]
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:
            raise TrainingError(
                f"{path}: this checkpoint cannot be read ({error}); remove it, and the training goes on from the one "
                "before it"
            ) from error
        if state["digest"] != digest:
            raise TrainingError(
                f"{path}: a checkpoint of another training: its settings, its captions or its model differ; choose "
                f"another folder, or remove {self.folder}"
            )
        return state

    @property
    def latest(self) -> int:
        """Iterations that the last one has behind it; 0 where there is none."""
        return max((int(path.stem.removeprefix("step-")) for path in self._found()), default=0)

    def clear(self) -> None:
        """Removes them all, once what they lead to is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # other runs' are in the same place
            self.folder.parent.rmdir()

    def _found(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
