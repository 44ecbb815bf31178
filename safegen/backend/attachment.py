"""What stands in for one site's `forward`, and what is open while it runs.

What is open for one call of the denoiser is held in a ContextVar, so that threads can share a denoiser.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor

from safegen.backend.merging import Checksum, Merged
from safegen.backend.standin import StandIn
from safegen.errors import AttestationError, CoverageError
from safegen.membrane.delta import Rows, Site, Sizes, Stack, add_delta, delta_norms, merged_weight, stack
from safegen.membrane.weights import Factor


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """What a site carries; sites that carry the same share one, so that it is compared by identity.

    Attributes:
        parts: Index, rank and scale of each membrane that has a factor there, ascending.
    """

    parts: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """What is open at all sites that carry the same.

    Attributes:
        columns: Which columns of an opening's coefficients have a factor there.
        stacked: Which of the site's stacked ranks those are; None for all.
        ranks: Rank of each of them.
        sizes: γ·s·scale of each open row and chosen rank.
    """

    columns: tuple[int, ...]
    stacked: slice | Tensor | None
    ranks: tuple[int, ...]
    sizes: Sizes


@dataclass(slots=True)
class _Plan:
    """What an opening works out once and its calls share: choices by what a site carries, chosen stacks by site."""

    choices: dict[Carried, Choice | None] = field(default_factory=dict[Carried, Choice | None])
    stacks: dict[str, Stack] = field(default_factory=dict[str, Stack])
    fired: set[str] = field(default_factory=set[str])


@dataclass(slots=True)
class Opening:
    """What is open during one call of the denoiser.

    Attributes:
        size: Number of rows of the call.
        membranes: Indices of the membranes open for some row, ascending.
        coefficients: [open rows, membranes]: γ·s, on the CPU.
        rows: Which rows some membrane is open for.
        fired: Sites that ran in this call.
        effects: Where not None, each site adds ‖γ s Δ‖ / ‖W x‖ [open rows, membranes] and counts itself.
    """

    size: int
    membranes: tuple[int, ...]
    coefficients: Tensor
    rows: Rows
    fired: set[str] = field(default_factory=set[str])
    effects: list[Tensor] | None = None
    _plan: _Plan = field(default_factory=_Plan)

    @classmethod
    def of(cls, permeability: Tensor, strengths: Tensor, *, measure: bool = False) -> Opening:
        """Prepares an opening.

        Args:
            permeability: γ, [rows, membranes], in [0, 1].
            strengths: s, [membranes].
            measure: Whether the sites measure each membrane's effect in this call.
        """
        sizes = permeability * strengths.to(permeability)
        acts = sizes.ne(0)
        membranes = tuple(acts.any(dim=0).nonzero().flatten().tolist())
        open_rows = acts.any(dim=1).nonzero().flatten().tolist()
        rows = _rows(open_rows, len(sizes))
        if len(open_rows) < len(sizes):
            sizes = sizes[open_rows]
        if len(membranes) < sizes.shape[1]:
            sizes = sizes[:, list(membranes)]
        return cls(len(permeability), membranes, sizes, rows, effects=[] if measure and membranes else None)

    def again(self, *, measure: bool) -> Opening:
        """Returns the same opening for a further call; what was worked out for this one is kept."""
        effects: list[Tensor] | None = [] if measure and self.membranes else None
        return Opening(self.size, self.membranes, self.coefficients, self.rows, effects=effects, _plan=self._plan)

    @property
    def fired_before(self) -> set[str]:
        """Sites that have run in this or an earlier call of this opening; the caller may add to it."""
        return self._plan.fired

    def at(self, carried: Carried) -> Choice | None:
        """Returns what is open at a site that carries this; None for nothing."""
        choices = self._plan.choices
        if carried not in choices:
            choices[carried] = self._choose(carried)
        return choices[carried]

    def _choose(self, carried: Carried) -> Choice | None:
        column = {membrane: k for k, membrane in enumerate(self.membranes)}
        stacked: list[int] = []
        columns: list[int] = []
        ranks: list[int] = []
        scales: list[float] = []
        start = 0
        for membrane, rank, scale in carried.parts:
            if membrane in column:
                stacked.extend(range(start, start + rank))
                columns.append(column[membrane])
                ranks.append(rank)
                scales.append(scale)
            start += rank
        if not columns:
            return None
        sizes = Sizes.of(self.coefficients[:, columns], ranks, scales)
        return Choice(tuple(columns), _rows(stacked, start), tuple(ranks), sizes)

    def stack_of(self, name: str, full: Stack, choice: Choice) -> Stack:
        """Returns the open part of a site's stack."""
        if choice.stacked is None:
            return full
        found = self._plan.stacks.get(name)
        if found is None or found.down.dtype != full.down.dtype or found.down.device != full.down.device:
            found = self._plan.stacks[name] = full.choose(choice.stacked)
        return found


def _rows(indices: Sequence[int], of: int) -> Rows:
    """Returns ascending indices in their cheapest form: None for all, a slice for a run, else a tensor."""
    if len(indices) == of:
        return None
    if not indices or indices[-1] - indices[0] + 1 == len(indices):
        return slice(indices[0], indices[-1] + 1) if indices else slice(0, 0)
    return torch.tensor(indices)


current: ContextVar[Opening | None] = ContextVar("safegen_opening", default=None)


_numbers = itertools.count()
_attachments: weakref.WeakValueDictionary[int, SiteAttachment] = weakref.WeakValueDictionary()

# Compiled code calls a site through one opaque operator. What is open is looked up when it runs, in Python, so a
# compiled denoiser has nothing of it baked in: neither γ nor the policy nor the number of open membranes recompiles.
# The site's number travels as a tensor, because a Python number would be a constant of the compiled code, and the
# repeated blocks of a regional compilation would each need their own.
_library = torch.library.Library("safegen", "FRAGMENT")
_library.define("open_site(Tensor(a!) y, Tensor x, Tensor number) -> ()")


def _open_site(y: Tensor, x: Tensor, number: Tensor) -> None:
    attachment = _attachments.get(int(number))
    if attachment is None:
        raise AttestationError(
            "compiled code runs a site whose policy has been removed; compile the denoiser again (torch._dynamo.reset)"
        )
    found = attachment.opened(x, y)
    if found is not y:
        y.copy_(found)


def _no_output(y: Tensor, x: Tensor, number: Tensor) -> None:
    """Tells compilers what the operator returns: it only writes to `y`."""


_library.impl("open_site", _open_site, "CompositeExplicitAutograd")
torch.library.register_fake("safegen::open_site", _no_output, lib=_library)


class SiteAttachment(StandIn):
    """Stands in for one site's `forward`.

    Attributes:
        merged: What runs in place of the base module, with static composition.
    """

    def __init__(
        self,
        name: str,
        module: Site,
        factors: Sequence[Factor],
        carried: Carried,
        copied: Callable[[SiteAttachment, dict[int, Any]], SiteAttachment],
    ) -> None:
        """Stacks the factors.

        Args:
            name: The site's qualified name.
            module: The site.
            factors: Those of the membranes in `carried`, in its order.
            carried: Which membranes they are of.
            copied: Takes part in `copy.deepcopy`: called with this attachment and deepcopy's memo.
        """
        super().__init__(module)
        self.name = name
        self.module = module
        self.carried = carried
        self._factors = factors
        self._copied = copied
        self._live = any(f.down.requires_grad or f.up.requires_grad for f in factors)
        self._stack = self._working = stack(factors)
        self.merged: Merged | None = None
        self._enrol()

    def _enrol(self) -> None:
        number = next(_numbers)
        self.number = torch.tensor(number)
        _attachments[number] = self

    def on_copy(
        self, module: Site, copied: Callable[[SiteAttachment, dict[int, Any]], SiteAttachment]
    ) -> SiteAttachment:
        """Returns this attachment for a copy of its site, on the same factors."""
        twin = self.on(module)
        twin.module, twin._copied = module, copied
        twin.merged = self.merged.on(module) if self.merged is not None else None
        twin._enrol()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns the attachment of the copy that is being made of the denoiser."""
        return cast("Self", self._copied(self, memo))

    def _full(self, like: Tensor) -> Stack:
        """Returns the stack of all membranes here, for an output like this one."""
        if self._live:  # in training the factors change at every step
            return stack(self._factors).to(like)
        working = self._working
        if working.down.dtype != like.dtype or working.down.device != like.device:
            working = self._working = self._stack.to(like)
        return working

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the site: the base module, then the open membranes' sum."""
        if not self._active:
            return self._base(x, *args, **kwargs)
        merged = self.merged
        y = self._base(x, *args, **kwargs) if merged is None else merged(x)
        if torch.compiler.is_compiling():
            torch.ops.safegen.open_site(y, x, self.number)
            return y
        return self.opened(x, y)

    def opened(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds to `y`, the base module's output for `x`, what is open in the call in progress.

        Raises:
            AttestationError: There is no such call.
            CoverageError: The batch was split, so that rows and prompts cannot be matched.
        """
        opening = current.get()
        if opening is None:
            raise AttestationError(
                f"site {self.name} was run outside of the denoiser's guarded forward, where no prompt is read: the "
                "root attachment was taken off, or the layer was called by itself or in another thread. Remove the "
                "policy (Guard.remove) to run layers without it."
            )
        if len(x) != opening.size:
            raise CoverageError(
                f"site {self.name} got {len(x)} rows of the {opening.size} in the batch, so that rows and prompts "
                "cannot be matched; turn off what splits the batch (forward chunking over dimension 0)."
            )
        opening.fired.add(self.name)
        return self.add(opening, x, y)

    def prepare(self, opening: Opening, like: Tensor) -> tuple[Choice, Stack] | None:
        """Returns what is open here, for an output like this one; None for nothing. Worked out once per opening."""
        choice = opening.at(self.carried) if opening.membranes else None
        return None if choice is None else (choice, opening.stack_of(self.name, self._full(like), choice))

    def add(self, opening: Opening, x: Tensor, y: Tensor) -> Tensor:
        """Adds to `y`, the base module's output for `x`, what an opening opens here."""
        prepared = self.prepare(opening, y)
        if prepared is None:
            return y
        choice, stacked = prepared
        rows = opening.rows.to(x.device) if isinstance(opening.rows, Tensor) else opening.rows
        if opening.effects is not None:
            opening.effects.append(self._measured(opening, x, y, stacked, choice, rows))
        return add_delta(self.module, x, y, stacked, choice.sizes, rows)

    def merge(self, sizes: Tensor, made_of: Checksum) -> Merged:
        """Merges γ·s of each membrane, [membranes], into a copy of the module's weight, whose checksum is `made_of`."""
        here = [(float(sizes[index]) * scale, rank) for index, rank, scale in self.carried.parts]
        spread = torch.tensor([size for size, rank in here for _ in range(rank)])
        return Merged(self.module, *merged_weight(self.module.weight, self._stack, spread), made_of)

    @property
    def over_hook(self) -> bool:
        """Whether it stands in for somebody else's hook, and not for the module's own `forward`."""
        return self._had is not None

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors of the membranes that it holds."""
        return self._stack.down, self._stack.up, self._working.down, self._working.up

    def _measured(self, opening: Opening, x: Tensor, y: Tensor, stacked: Stack, choice: Choice, rows: Rows) -> Tensor:
        """Returns ‖γ s Δ‖ / ‖W x‖ of each membrane here, [open rows, membranes of the opening]."""
        part, base = (x, y) if rows is None else (x[rows], y[rows])
        norms = delta_norms(self.module, part.to(y.dtype), stacked, choice.sizes, choice.ranks)
        ratios = torch.zeros(len(part), len(opening.membranes), device=y.device)
        size = base.float().flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-12)
        ratios[:, list(choice.columns)] = norms / size
        return ratios
