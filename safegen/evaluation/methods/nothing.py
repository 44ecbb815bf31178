"""Nothing: the base model, which every figure stands beside."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from safegen.evaluation.methods.base import Drawer, Kind, Task, Unstored, Untrained


@dataclass(frozen=True, slots=True)
class Nothing(Untrained, Unstored):
    """The base model as it is; its own eraser."""

    name: ClassVar[str] = "base"
    kind: ClassVar[Kind] = "none"
    several: ClassVar[str] = "nothing to compose"

    def make(self, pipe: Any, task: Task) -> Self:
        """See `Method`."""
        return self

    @contextmanager
    def on(self, pipe: Any) -> Generator[Drawer]:
        """See `Eraser`."""
        yield pipe
