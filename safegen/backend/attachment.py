"""What stands in for one site's `forward`, and what is open while it runs.

What is open for one call of the denoiser is held in a ContextVar, so that threads can share a denoiser.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safegen.errors import AttestationError, CoverageError
from safegen.membrane.delta import Site, Stack, add_delta, delta_norms, stack
from safegen.membrane.weights import Factor

_STACKS_KEPT = 8  # combinations of open membranes whose stacks a site keeps


@dataclass(slots=True)
class Opening:
    """What is open during one call of the denoiser.

    Attributes:
        size: Number of rows of the call.
        membranes: Indices of the membranes open for some row, ascending.
        coefficients: [open rows, membranes]: γ·s.
        rows: Indices of the rows for which some membrane is open; None for all.
        fired: Sites that ran in this call.
        effects: Where not None, each site adds ‖γ s Δ‖ / ‖W x‖ [open rows, membranes] and counts itself.
    """

    size: int
    membranes: tuple[int, ...]
    coefficients: Tensor
    rows: Tensor | None
    fired: set[str] = field(default_factory=set[str])
    effects: list[Tensor] | None = None

    @classmethod
    def of(cls, permeability: Tensor, strengths: Tensor, *, measure: bool = False) -> Opening:
        """Prepares an opening.

        Args:
            permeability: γ, [rows, membranes], in [0, 1].
            strengths: s, [membranes].
            measure: Whether the sites measure each membrane's effect in this call.
        """
        sizes = permeability * strengths.to(permeability)
        membranes = tuple(sizes.ne(0).any(dim=0).nonzero().flatten().tolist())
        open_rows = sizes.ne(0).any(dim=1)
        rows = None if bool(open_rows.all()) else open_rows.nonzero().flatten()
        chosen = sizes if rows is None else sizes[rows]
        effects: list[Tensor] | None = [] if measure and membranes else None
        return cls(len(sizes), membranes, chosen[:, list(membranes)], rows, effects=effects)


current: ContextVar[Opening | None] = ContextVar("safegen_opening", default=None)


def forwards(module: nn.Module) -> Iterator[Any]:
    """Yields what stands in for a module's `forward`, outermost first; a hook names what it wraps `__wrapped__`."""
    forward = module.__dict__.get("forward")
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def refuse_copy(self: object, memo: dict[int, Any]) -> Any:
    """Refuses `copy.deepcopy`: a copy would run the original's weights."""
    raise AttestationError(
        "a denoiser under a policy cannot be deep-copied, the copy would not be guarded; call remove() on the Guard, "
        "copy, and apply the policy to each"
    )


class SiteAttachment:
    """Stands in for one site's `forward`."""

    __deepcopy__ = refuse_copy

    def __init__(self, name: str, module: Site, factors: Sequence[Factor | None]) -> None:
        self.name = name
        self.module = module
        self._factors = factors
        self._base: Callable[..., Tensor] = module.forward
        self._had: Any = None
        self._stacks: OrderedDict[tuple[Any, ...], tuple[Stack, tuple[int, ...]]] = OrderedDict()

    def attach(self) -> None:
        """Puts the attachment in place."""
        self._base, self._had = self.module.forward, self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = self

    def detach(self) -> None:
        """Takes the attachment off; the instance is as before."""
        if self._had is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._had

    def stacked(self, membranes: tuple[int, ...], like: Tensor) -> tuple[Stack, tuple[int, ...]] | None:
        """Returns the stack of the open membranes that have a factor here, and their columns; None for none."""
        columns = tuple(k for k, m in enumerate(membranes) if self._factors[m] is not None)
        if not columns:
            return None
        key = (membranes, like.device, like.dtype)
        found = self._stacks.get(key)
        factors = [f for k in columns if (f := self._factors[membranes[k]]) is not None]
        if any(f.down.requires_grad for f in factors):
            return stack(factors, like), columns  # in training the factors change at every step
        if found is None:
            found = self._stacks[key] = (stack(factors, like), columns)
            while len(self._stacks) > _STACKS_KEPT:
                self._stacks.popitem(last=False)
        return found

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the site: the base module, then the open membranes' sum."""
        y = self._base(x, *args, **kwargs)
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
        found = self.stacked(opening.membranes, x) if opening.membranes else None
        if found is None:
            return y
        stacked, columns = found
        ranks = torch.tensor(stacked.ranks)
        coefficients = opening.coefficients[:, list(columns)].repeat_interleave(ranks, dim=1).to(x.device)
        rows = opening.rows if opening.rows is None else opening.rows.to(x.device)
        if opening.effects is not None:
            self._measure(opening, x, y, stacked, coefficients, columns)
        return add_delta(self.module, x, y, stacked, coefficients, rows)

    def _measure(
        self, opening: Opening, x: Tensor, y: Tensor, stacked: Stack, coefficients: Tensor, columns: Sequence[int]
    ) -> None:
        rows = opening.rows
        part, base = (x, y) if rows is None else (x[rows.to(x.device)], y[rows.to(y.device)])
        norms = delta_norms(self.module, part, stacked, coefficients).cpu()
        ratios = torch.zeros(len(part), len(opening.membranes))
        size = base.float().flatten(1).norm(dim=1, keepdim=True).cpu().clamp(min=1e-12)
        ratios[:, list(columns)] = norms / size
        assert opening.effects is not None
        opening.effects.append(ratios)
