"""Methods that change nothing of the model: a negative prompt, and a list of blocked words."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from safegen.evaluation.methods.base import Drawer, Kind, Task, Unstored, Untrained, listed
from safegen.text import PhraseMatcher


@dataclass(frozen=True, slots=True)
class NegativePrompt(Untrained):
    """All names as a negative prompt: `ε̄ = ε(names) + s (ε(c) - ε(names))` takes the place of guidance from ε(∅)."""

    name: ClassVar[str] = "negative-prompt"
    kind: ClassVar[Kind] = "inference"
    several: ClassVar[str] = "all names in one text"

    def make(self, pipe: Any, task: Task) -> Negative:
        """See `Method`."""
        return Negative(listed(task.names()))


@dataclass(frozen=True, slots=True)
class Negative(Unstored):
    """A negative prompt for every image."""

    text: str

    @contextmanager
    def on(self, pipe: Any) -> Generator[Drawer]:
        """See `Eraser`."""

        def draw(prompt: list[str], **settings: Any) -> Any:
            return pipe(prompt, negative_prompt=[self.text] * len(prompt), **settings)

        yield draw


@dataclass(frozen=True, slots=True)
class BlockList(Untrained):
    """A prompt in which a name stands, whole and in any spelling that policies know, gets a black image.

    The model is not asked what it would have drawn; other words for the same thing pass.
    """

    name: ClassVar[str] = "block-list"
    kind: ClassVar[Kind] = "gate"
    several: ClassVar[str] = "one list"

    def make(self, pipe: Any, task: Task) -> Blocked:
        """See `Method`."""
        return Blocked(PhraseMatcher(task.names()))


@dataclass(frozen=True, slots=True)
class Blocked(Unstored):
    """Black images for prompts that name a target."""

    matcher: PhraseMatcher

    @contextmanager
    def on(self, pipe: Any) -> Generator[Drawer]:
        """See `Eraser`. Blocked prompts are drawn all the same: in another batch others might change in a last bit."""

        def draw(prompt: list[str], **settings: Any) -> Any:
            result = pipe(prompt, **settings)
            result.images = [
                Image.new("RGB", image.size) if self.matcher.find(text) else image
                for text, image in zip(prompt, result.images, strict=True)
            ]
            return result

        yield draw
