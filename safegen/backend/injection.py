"""Attaching membranes to a denoiser, and taking them off without a trace.

One attachment per site, summing all membranes, set as the instance's `forward`: it survives LoRA loading and fusing,
`from_pipe`, copies, offload, dtype casts and compilation, and undoes exactly (docs/decisions/0002).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from safegen.backend.attachment import Carried, Opening, SiteAttachment, current
from safegen.backend.merging import merge, renew
from safegen.backend.reruns import cached, recomputed
from safegen.backend.sites import Sites, plan
from safegen.backend.standin import StandIn, in_place_of
from safegen.errors import AlreadyAppliedError, AttestationError, CoverageError, SafegenError
from safegen.membrane.weights import Factor, Membrane

__all__ = ["Injection", "Opening"]

# Compilers see the denoiser's own forward, and nothing of what is decided and recorded around it.
_left_to_python: Callable[[Any], Any] = torch.compiler.disable(recursive=False)  # but what it calls may be compiled
_not_compiled: Callable[[Any], Any] = torch.compiler.disable()

Before = Callable[[tuple[Any, ...], dict[str, Any]], Opening]
After = Callable[[Opening], None]
Failed = Callable[[SafegenError], None]


class Injection:
    """Membranes attached to one denoiser.

    `attach` and `detach` are exact inverses: afterwards the denoiser's state_dict, repr and outputs are those from
    before, bit for bit. What opens is what `before` says, call by call; a site that runs outside of such a call
    refuses.
    """

    def __init__(self, denoiser: nn.Module, sites: Sites, membranes: Sequence[Membrane], family: str) -> None:
        """Plans every site first, so that a refused membrane leaves the denoiser untouched.

        Raises:
            BaseModelMismatchError: A membrane for another base model.
            NoMatchingSiteError: A membrane holds sites that the denoiser lacks.
            ShapeMismatchError: A factor does not fit.
            AlreadyAppliedError: The denoiser carries an injection already.
        """
        _refuse_second(denoiser)
        plans = [plan(membrane, sites, family) for membrane in membranes]
        factors: dict[str, dict[int, Factor]] = {name: {} for name in sites.modules}
        for index, (membrane, names) in enumerate(zip(membranes, plans, strict=True)):
            for key, name in names.items():
                factors[name][index] = membrane.factors[key]
        self.denoiser = denoiser
        self._sites: dict[str, SiteAttachment] = {}
        shared: dict[tuple[Any, ...], Carried] = {}
        for name, found in factors.items():
            if found:
                parts = tuple((index, factor.rank, factor.scale) for index, factor in found.items())
                carried = shared.setdefault(parts, Carried(parts))
                self._sites[name] = SiteAttachment(
                    name, sites.modules[name], list(found.values()), carried, self._copied_site
                )
        self._planned = len(self._sites)
        self._copies: weakref.WeakSet[Injection] = weakref.WeakSet()
        self._root: _RootAttachment | None = None
        self._merged: Tensor | None = None

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites that carry at least one membrane."""
        return tuple(self._sites)

    def site(self, name: str) -> SiteAttachment:
        """Returns one site's attachment."""
        return self._sites[name]

    @property
    def attached(self) -> bool:
        """Whether it was attached, and not detached since."""
        return self._root is not None

    def attach(self, before: Before, after: After, failed: Failed = lambda _: None) -> None:
        """Attaches everything.

        Args:
            before: Called with the denoiser's arguments before each call; returns what is open.
            after: Called with the opening after each call in which every planned site fired.
            failed: Called with the error of a call that safegen itself stopped, before it is raised.

        Raises:
            AlreadyAppliedError: The denoiser has got another injection since this one was planned.
        """
        _refuse_second(self.denoiser)
        self._root = _RootAttachment(self, before, after, failed)
        for attachment in self._sites.values():
            attachment.attach()
        self._root.attach()

    def merge(self, sizes: Tensor) -> None:
        """Merges fixed sizes of the membranes for every row: the sites run with merged weights, and nothing opens.

        The denoiser's own weights are left as they are (see `safegen.backend.merging`). Takes effect once attached, and
        until it is detached.

        Args:
            sizes: γ·s of each membrane, [membranes].

        Raises:
            UnsupportedBackendError: A site does not run its weight by itself, so that no other can take its place.
            AttestationError: The weights' number format is too coarse for the membranes.
        """
        merge(self._sites.values(), sizes)
        self._merged = sizes

    @property
    def merged(self) -> bool:
        """Whether membranes are merged (static composition), so that nothing must open."""
        return self._merged is not None

    @contextmanager
    def holding(self, sizes: Tensor) -> Generator[Self]:
        """Merges fixed sizes, attaches, and detaches at the end: for evaluation and benchmarks. No prompt is read.

        Args:
            sizes: See `merge`.
        """
        self.merge(sizes)
        shut = torch.zeros(0)

        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opening:
            rows = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim)
            return Opening.of(shut.expand(rows, 0), shut)

        self.attach(before, lambda _: None)
        try:
            yield self
        finally:
            self.detach()

    def detach(self) -> None:
        """Takes everything off, also from deep copies of the denoiser.

        Raises:
            AttestationError: Something else has replaced an attachment; nothing is taken off then.
        """
        everywhere = {self, *self._copies}
        for injection in everywhere:
            injection.check()
        for injection in everywhere:
            assert injection._root is not None
            for attachment in (injection._root, *injection._sites.values()):
                attachment.detach()
            for attachment in injection._sites.values():
                attachment.merged = None
            injection._root = injection._merged = None

    def check(self) -> None:
        """Proves that every planned attachment is in place and belongs to the module that the denoiser runs.

        Raises:
            AttestationError: Names the first site that is not as planned.
        """
        if self._root is None or not self._root.attached:
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

    @_left_to_python
    def run(self, opening: Opening, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `forward` with an opening in force, and proves that every planned site took part.

        Raises:
            AttestationError: An attachment is not in place (looked at in the first call of an opening), or merged
                weights would be trained.
            CoverageError: Planned sites did not run.
        """
        if not opening.fired_before:
            self.check()
            if self._merged is not None:
                self._prove_merged(self._merged)
        token = current.set(opening)
        try:
            if torch.is_grad_enabled():
                with recomputed(self.denoiser, opening):
                    result = forward(*args, **kwargs)
            else:
                result = forward(*args, **kwargs)
        finally:
            current.reset(token)
        self._prove_coverage(opening)
        return result

    def _prove_merged(self, sizes: Tensor) -> None:
        """Makes sure that what is merged is the denoiser as it is now."""
        if torch.is_grad_enabled() and any(site.module.weight.requires_grad for site in self._sites.values()):
            raise AttestationError(
                "merged weights pass no gradient on to the denoiser's own; expected a call under torch.no_grad, or "
                'weights that need no gradient. Train with composition="runtime".'
            )
        renew(self._sites.values(), sizes)

    def _prove_coverage(self, opening: Opening) -> None:
        if len(self._sites) != self._planned:
            raise CoverageError(
                f"{len(self._sites)} of {self._planned} sites were copied with this {type(self.denoiser).__name__}; "
                "call remove() on the Guard, copy, and apply the policy to each"
            )
        if len(opening.fired) != self._planned:
            silent = self._sites.keys() - opening.fired
            silent -= cached(self.denoiser, silent & opening.fired_before)
            if silent:
                raise CoverageError(
                    f"{len(silent)} of {self._planned} planned sites did not run in this step, first {min(silent)!r}; "
                    "the image cannot be trusted and was stopped. Turn off what skips them (fused projections, a cache "
                    "that holds another run or other prompts)."
                )
        opening.fired_before.update(opening.fired)

    def _copied_site(self, attachment: SiteAttachment, memo: dict[int, Any]) -> SiteAttachment:
        """Takes part in `copy.deepcopy` of the denoiser, site by site."""
        twin = self._on_copy(memo)
        found = twin._sites[attachment.name] = attachment.on_copy(memo[id(attachment.module)], twin._copied_site)
        return found

    def _on_copy(self, memo: dict[int, Any]) -> Injection:
        """Returns the injection of the copy that is being made of the denoiser: the same policy, on its own sites."""
        if id(self) in memo:
            return memo[id(self)]
        if id(self.denoiser) not in memo or self._root is None:
            raise AttestationError(
                f"a part of a {type(self.denoiser).__name__} under a policy cannot be deep-copied: it would run where "
                "no prompt is read. Copy the whole denoiser, or call remove() on the Guard first."
            )
        twin = memo[id(self)] = copy.copy(self)
        twin.denoiser, twin._sites = memo[id(self.denoiser)], {}
        twin._root = self._root.on_copy(twin)
        return twin

    def copied_root(self, memo: dict[int, Any]) -> _RootAttachment:
        """Takes part in `copy.deepcopy` of the denoiser, whose `forward` is its last attribute."""
        twin = self._on_copy(memo)
        self._copies.add(twin)  # shared by all copies, so that a copy's copy is known when the copy is gone
        assert twin._root is not None
        return twin._root


class _RootAttachment(StandIn):
    """Stands in for the denoiser's `forward`: asks what is open, runs, and checks coverage."""

    def __init__(self, injection: Injection, before: Before, after: After, failed: Failed) -> None:
        super().__init__(injection.denoiser)
        self._injection = injection
        self._before, self._after, self._failed = before, after, failed

    def on_copy(self, injection: Injection) -> _RootAttachment:
        twin = self.on(injection.denoiser)
        twin._injection = injection
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return cast("Self", self._injection.copied_root(memo))

    @_left_to_python
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return self._base(*args, **kwargs)
        try:
            opening = _outside_of_compilers(self._before, args, kwargs)
            result = self._injection.run(opening, self._base, *args, **kwargs)
            _outside_of_compilers(self._after, opening)
        except SafegenError as error:
            _outside_of_compilers(self._failed, error)
            raise
        return result


@_not_compiled
def _outside_of_compilers(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _refuse_second(denoiser: nn.Module) -> None:
    if any(isinstance(forward, _RootAttachment) for forward in in_place_of(denoiser)):
        raise AlreadyAppliedError(
            f"this {type(denoiser).__name__} already carries a policy; call remove() on the first Guard, then "
            "apply the second policy"
        )
