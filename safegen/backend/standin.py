"""What stands in for a method of a host's object, as an attribute of that one instance."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self

from safegen.errors import AttestationError


def in_place_of(owner: Any, name: str = "forward") -> Iterator[Any]:
    """Yields what stands in for a method of an instance, outermost first; a hook names what it wraps `__wrapped__`."""
    found = owner.__dict__.get(name)
    while found is not None:
        yield found
        found = getattr(found, "__wrapped__", None)


class StandIn:
    """Stands in for one method of one object, and for those of the copies that are made of the object meanwhile."""

    def __init__(self, owner: Any, name: str = "forward") -> None:
        self._owner, self._name = owner, name
        self._base: Callable[..., Any] = getattr(owner, name)
        self._had = owner.__dict__.get(name)
        self._active = False
        self._copies: weakref.WeakSet[StandIn] = weakref.WeakSet()

    def attach(self) -> None:
        """Takes its place."""
        self._base, self._had = getattr(self._owner, self._name), self._owner.__dict__.get(self._name)
        self._owner.__dict__[self._name] = self
        self._active = True

    @property
    def attached(self) -> bool:
        """Whether it is in place, below hooks that were installed later or not."""
        return any(found is self for found in in_place_of(self._owner, self._name))

    def detach(self) -> None:
        """Gives its place back; the object and its copies are as before.

        Hooks that were installed since stay where they are, and run what they would have run without it. Where one of
        them keeps a reference of its own, it finds a stand-in that only calls what it stood in for.
        """
        for each in {self, *self._copies}:
            each._release()

    def _release(self) -> None:
        self._active = False
        if self._owner.__dict__.get(self._name) is self:
            if self._had is None:
                del self._owner.__dict__[self._name]
            else:
                self._owner.__dict__[self._name] = self._had
        elif self.attached:
            self._leave_hooks()

    def _leave_hooks(self) -> None:
        """Takes itself out of the hooks of diffusers and accelerate that were installed over it."""
        for hook in in_place_of(self._owner, self._name):
            if getattr(hook, "__wrapped__", None) is self:
                hook.__wrapped__ = self._base
        if self._owner.__dict__.get("_old_forward") is self:  # accelerate
            self._owner._old_forward = self._base
        registry = getattr(self._owner, "_diffusers_hook", None)
        for reference in getattr(registry, "_fn_refs", ()):
            for place in ("forward", "original_forward"):
                if getattr(reference, place) is self:
                    setattr(reference, place, self._base)

    def on(self, owner: Any) -> Self:
        """Returns this stand-in for a copy of its owner, active as this one is.

        Raises:
            AttestationError: A hook is below it, whose copy would go on running the original.
        """
        if self._had is not None:
            raise AttestationError(
                f"this {type(owner).__name__} has a hook on {self._name!r} that was installed before the policy "
                "(offload, casting), whose copy would go on running the original. Call remove() on the Guard, copy, "
                "and apply the policy to each."
            )
        twin = copy.copy(self)
        twin._owner = owner
        twin._base = getattr(type(owner), self._name).__get__(owner)
        self._copies.add(twin)  # a set that all copies share, so that a copy's copy is known when the copy is gone
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Goes on standing in on the copy that is being made of its owner."""
        if id(self._owner) not in memo:
            raise AttestationError(
                f"{self._name!r} of a {type(self._owner).__name__} under a policy was deep-copied without its owner; "
                "copy the object, or call remove() on the Guard first"
            )
        return self.on(memo[id(self._owner)])
