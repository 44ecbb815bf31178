"""What every erasing method is: settings that make an eraser for a pipeline, and the eraser that can be put on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import Tensor

from safegen.errors import UsageError

Kind = Literal["none", "adapter", "weights", "inference", "gate"]
"""How a method acts. `adapter`: factors beside the weights, here fully open (γ = 1) for every prompt; `weights`: it
changes weights; `inference`: another guidance for every prompt; `gate`: it only looks at the prompt's words."""


@dataclass(frozen=True, slots=True)
class Target:
    """One concept to erase.

    Attributes:
        concept: Its id.
        names: Its names, the main one first.
        templates: Prompts around a name (`{}`), each with what remains of it once the name is erased.
        surrogate: What it turns into; empty: what remains of the prompt.
        anchor: A broader or similar concept, which concept ablation overwrites it with.
    """

    concept: str
    names: tuple[str, ...]
    templates: tuple[tuple[str, str], ...] = (("{}", ""),)
    surrogate: str = ""
    anchor: str = ""

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise UsageError(f"target {self.concept!r} has no name; expected at least one, none of them empty")

    def prompts(self) -> tuple[tuple[str, str], ...]:
        """Returns every prompt that names the target, with what it should mean instead."""
        return tuple(
            (template.format(name), template.format(self.surrogate) if self.surrogate else rest)
            for template, rest in self.templates
            for name in self.names
        )


@dataclass(frozen=True, slots=True)
class Task:
    """What a method is asked for.

    Attributes:
        targets: What to erase, all at once.
        keep: Captions of what must be left alone; methods that preserve nothing do not read them.
        seed: Seed of everything random.
    """

    targets: tuple[Target, ...]
    keep: tuple[str, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.targets:
            raise UsageError("no target to erase; expected at least one")

    def names(self) -> tuple[str, ...]:
        """Returns the names of all targets."""
        return tuple(name for target in self.targets for name in target.names)


class Drawer(Protocol):
    """A pipeline, or what stands in for its call."""

    def __call__(self, prompt: list[str], **settings: Any) -> Any:
        """Draws one image per prompt; the result has `images`."""
        ...


class Eraser(Protocol):
    """What a method made for one pipeline."""

    @property
    def stored(self) -> int:
        """Bytes that have to be kept to erase again: factors, changed weights, or nothing."""
        ...

    def on(self, pipe: Any) -> AbstractContextManager[Drawer]:
        """Puts the eraser on the pipeline that it was made for, and yields what draws erased.

        Leaving the context takes it off: the pipeline's weights and methods are those from before, bit for bit.
        """
        ...


class Method(Protocol):
    """One erasing method with its settings; a frozen dataclass.

    Attributes:
        name: Its name in the registry and in every table.
        kind: How it acts.
        several: How it takes several targets at once.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    several: ClassVar[str]

    def scaled(self, effort: float) -> Self:
        """Returns the same method with its iterations multiplied; itself where it has none."""
        ...

    def make(self, pipe: Any, task: Task) -> Eraser:
        """Makes the eraser; the pipeline's weights are the same before and after, bit for bit.

        Raises:
            SafegenError: The pipeline is of no known family, or the method cannot act on it.
        """
        ...


class Untrained:
    """A `Method` without iterations."""

    __slots__ = ()

    def scaled(self, effort: float) -> Self:
        """See `Method`."""
        return self


class Unstored:
    """An `Eraser` that keeps nothing but names and settings."""

    __slots__ = ()

    @property
    def stored(self) -> int:
        """See `Eraser`."""
        return 0


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def fewer(iterations: int, effort: float) -> int:
    """Returns iterations multiplied by an effort, at least 1."""
    return max(1, round(iterations * effort))


def listed(names: Sequence[str]) -> str:
    """Returns names as one text, as negative prompts are written."""
    return ", ".join(names)
