"""Attaching membranes to a denoiser, and taking them off without a trace.

One attachment per site, summing all membranes, set as the instance's `forward`: it survives LoRA loading and fusing,
`from_pipe`, offload, dtype casts and compilation, and undoes exactly (docs/decisions/0002). What is open for one call
is held in a ContextVar, so that threads can share a denoiser.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safegen.backend.sites import Sites, plan
from safegen.errors import AlreadyAppliedError, AttestationError, CoverageError, SafegenError
from safegen.membrane.delta import Site, Stack, add_delta, delta_norms, stack
from safegen.membrane.weights import Factor, Membrane

_STACKS_KEPT = 8  # combinations of open membranes whose stacks a site keeps


@dataclass(slots=True)
class Opening:
    """What is open during one call of the denoiser.

    Attributes:
        membranes: Indices of the membranes open for some row, ascending.
        coefficients: [open rows, membranes]: γ·s.
        rows: Indices of the rows for which some membrane is open; None for all.
        fired: Sites that ran in this call.
        effects: Where not None, each site adds ‖γ s Δ‖ / ‖W x‖ [open rows, membranes] and counts itself.
    """

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
        return cls(membranes, chosen[:, list(membranes)], rows, effects=[] if measure and membranes else None)


_current: ContextVar[Opening | None] = ContextVar("safegen_opening", default=None)


class SiteAttachment:
    """Stands in for one site's `forward`."""

    def __init__(self, name: str, module: Site, factors: Sequence[Factor | None]) -> None:
        self.name = name
        self.module = module
        self._factors = factors
        self._base = module.forward
        self._had = module.__dict__.get("forward")
        self._stacks: OrderedDict[tuple[Any, ...], tuple[Stack, tuple[int, ...]]] = OrderedDict()

    def attach(self) -> None:
        """Puts the attachment in place."""
        self.module.__dict__["forward"] = self

    def detach(self) -> None:
        """Takes the attachment off; the instance is as before."""
        if self._had is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._had

    @property
    def attached(self) -> bool:
        """Whether the attachment is what the module calls."""
        return self.module.__dict__.get("forward") is self

    def stacked(self, membranes: tuple[int, ...]) -> tuple[Stack, tuple[int, ...]] | None:
        """Returns the stack of the open membranes that have a factor here, and their columns; None for none."""
        columns = tuple(k for k, m in enumerate(membranes) if self._factors[m] is not None)
        if not columns:
            return None
        weight = self.module.weight
        key = (membranes, weight.device, weight.dtype)
        found = self._stacks.get(key)
        factors = [f for k in columns if (f := self._factors[membranes[k]]) is not None]
        if any(f.down.requires_grad for f in factors):
            return stack(factors, weight), columns  # in training the factors change at every step
        if found is None:
            found = self._stacks[key] = (stack(factors, weight), columns)
            while len(self._stacks) > _STACKS_KEPT:
                self._stacks.popitem(last=False)
        return found

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the site: the base module, then the open membranes' sum."""
        y = self._base(x, *args, **kwargs)
        opening = _current.get()
        if opening is None:
            return y
        opening.fired.add(self.name)
        found = self.stacked(opening.membranes) if opening.membranes else None
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


Before = Callable[[tuple[Any, ...], dict[str, Any]], Opening | None]
After = Callable[[Opening], None]
Failed = Callable[[SafegenError], None]


class Injection:
    """Membranes attached to one denoiser.

    `attach` and `detach` are exact inverses: afterwards the denoiser's state_dict, repr and outputs are those from
    before, bit for bit. Nothing opens until `gate` says so.
    """

    def __init__(self, denoiser: nn.Module, sites: Sites, membranes: Sequence[Membrane], family: str) -> None:
        """Plans every site first, so that a refused membrane leaves the denoiser untouched.

        Raises:
            BaseModelMismatchError: A membrane for another base model.
            NoMatchingSiteError: A membrane holds sites that the denoiser lacks.
            ShapeMismatchError: A factor does not fit.
            AlreadyAppliedError: The denoiser carries an injection already.
        """
        if isinstance(denoiser.__dict__.get("forward"), _RootAttachment):
            raise AlreadyAppliedError(
                f"this {type(denoiser).__name__} already carries a policy; call remove() on the first Guard, then "
                "apply the second policy"
            )
        plans = [plan(membrane, sites, family) for membrane in membranes]
        factors: dict[str, list[Factor | None]] = {name: [None] * len(membranes) for name in sites.modules}
        for index, (membrane, names) in enumerate(zip(membranes, plans, strict=True)):
            for key, name in names.items():
                factors[name][index] = membrane.factors[key]
        self.denoiser = denoiser
        self._sites = {
            name: SiteAttachment(name, module, factors[name])
            for name, module in sites.modules.items()
            if any(f is not None for f in factors[name])
        }
        self._root: _RootAttachment | None = None

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites that carry at least one membrane."""
        return tuple(self._sites)

    def attach(self, before: Before, after: After, failed: Failed = lambda _: None) -> None:
        """Attaches everything.

        Args:
            before: Called with the denoiser's arguments before each call; returns what is open, or None to leave the
                membranes out of this call altogether (training's closed predictions).
            after: Called with the opening after each call in which every planned site fired.
            failed: Called with the error of a call that safegen itself stopped, before it is raised.
        """
        self._root = _RootAttachment(self, before, after, failed)
        for attachment in self._sites.values():
            attachment.attach()
        self.denoiser.__dict__["forward"] = self._root

    def detach(self) -> None:
        """Takes everything off.

        Raises:
            AttestationError: Something else has replaced an attachment; nothing is taken off then.
        """
        self.check()
        assert self._root is not None
        for attachment in self._sites.values():
            attachment.detach()
        self._root.detach()
        self._root = None

    def check(self) -> None:
        """Proves that every planned attachment is in place and belongs to the module that the denoiser runs.

        Raises:
            AttestationError: Names the first site that is not as planned.
        """
        if self._root is None or self.denoiser.__dict__.get("forward") is not self._root:
            raise AttestationError(
                f"the membranes' root attachment on {type(self.denoiser).__name__} is gone; the policy is not in "
                "force. Apply it again."
            )
        modules: Mapping[int, str] = {id(module): name for name, module in self.denoiser.named_modules()}
        for name, attachment in self._sites.items():
            if not attachment.attached or id(attachment.module) not in modules:
                raise AttestationError(
                    f"site {name} no longer carries its membrane: the module was replaced or its forward overwritten. "
                    "Remove what did that (fused projections, quantisation, another patch) and apply the policy again."
                )

    def run(self, opening: Opening | None, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `forward` with an opening in force, and proves that every planned site took part.

        Raises:
            CoverageError: Planned sites did not run.
        """
        token = _current.set(opening)
        try:
            result = forward(*args, **kwargs)
        finally:
            _current.reset(token)
        if opening is not None and len(opening.fired) != len(self._sites):
            silent = sorted(self._sites.keys() - opening.fired)
            raise CoverageError(
                f"{len(silent)} of {len(self._sites)} planned sites did not run in this step, first {silent[0]!r}; the "
                "image cannot be trusted and was stopped. Turn off what skips them (fused projections, step caches)."
            )
        return result


class _RootAttachment:
    """Stands in for the denoiser's `forward`: asks what is open, runs, and checks coverage."""

    def __init__(self, injection: Injection, before: Before, after: After, failed: Failed) -> None:
        self._injection = injection
        self._before, self._after, self._failed = before, after, failed
        self._base = injection.denoiser.forward
        self._had = injection.denoiser.__dict__.get("forward")

    def detach(self) -> None:
        if self._had is None:
            del self._injection.denoiser.__dict__["forward"]
        else:
            self._injection.denoiser.__dict__["forward"] = self._had

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            opening = self._before(args, kwargs)
            result = self._injection.run(opening, self._base, *args, **kwargs)
        except SafegenError as error:
            self._failed(error)
            raise
        if opening is not None:
            self._after(opening)
        return result
