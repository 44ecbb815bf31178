"""Attaching membranes to a denoiser, and taking them off without a trace.

One attachment per site, summing all membranes, set as the instance's `forward`: it survives LoRA loading and fusing,
`from_pipe`, offload, dtype casts and compilation, and undoes exactly (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from safegen.backend.attachment import Opening, SiteAttachment, current, forwards, refuse_copy
from safegen.backend.sites import Sites, plan
from safegen.errors import AlreadyAppliedError, AttestationError, CoverageError, SafegenError
from safegen.membrane.weights import Factor, Membrane

__all__ = ["Injection", "Opening"]

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
        self.denoiser.__dict__["forward"] = self._root

    def detach(self) -> None:
        """Takes everything off.

        Raises:
            AttestationError: Something else has replaced or wrapped an attachment; nothing is taken off then.
        """
        self.check()
        assert self._root is not None
        attachments = [self._root, *self._sites.values()]
        wrapped = sum(next(forwards(a.module)) is not a for a in attachments)
        if wrapped:
            raise AttestationError(
                f"hooks that were installed after the policy wrap {wrapped} of its attachments (offload, casting); "
                "take those hooks off first"
            )
        for attachment in attachments:
            attachment.detach()
        self._root = None

    def check(self) -> None:
        """Proves that every planned attachment is in place and belongs to the module that the denoiser runs.

        Raises:
            AttestationError: Names the first site that is not as planned.
        """
        if self._root is None or not any(forward is self._root for forward in forwards(self.denoiser)):
            raise AttestationError(
                f"the membranes' root attachment on {type(self.denoiser).__name__} is gone; the policy is not in "
                "force. Apply it again."
            )
        modules: Mapping[int, str] = {id(module): name for name, module in self.denoiser.named_modules()}
        for name, attachment in self._sites.items():
            carried = any(forward is attachment for forward in forwards(attachment.module))
            if not carried or id(attachment.module) not in modules:
                raise AttestationError(
                    f"site {name} no longer carries its membrane: the module was replaced or its forward overwritten. "
                    "Remove what did that (fused projections, quantisation, another patch) and apply the policy again."
                )

    def run(self, opening: Opening, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `forward` with an opening in force, and proves that every planned site took part.

        Raises:
            CoverageError: Planned sites did not run.
        """
        token = current.set(opening)
        try:
            result = forward(*args, **kwargs)
        finally:
            current.reset(token)
        if len(opening.fired) != len(self._sites):
            silent = sorted(self._sites.keys() - opening.fired)
            raise CoverageError(
                f"{len(silent)} of {len(self._sites)} planned sites did not run in this step, first {silent[0]!r}; the "
                "image cannot be trusted and was stopped. Turn off what skips them (fused projections, step caches)."
            )
        return result


class _RootAttachment:
    """Stands in for the denoiser's `forward`: asks what is open, runs, and checks coverage."""

    __deepcopy__ = refuse_copy

    def __init__(self, injection: Injection, before: Before, after: After, failed: Failed) -> None:
        self.module = injection.denoiser
        self._injection = injection
        self._before, self._after, self._failed = before, after, failed
        self._base = self.module.forward
        self._had = self.module.__dict__.get("forward")

    def detach(self) -> None:
        if self._had is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._had

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            opening = self._before(args, kwargs)
            result = self._injection.run(opening, self._base, *args, **kwargs)
            self._after(opening)
        except SafegenError as error:
            self._failed(error)
            raise
        return result


def _refuse_second(denoiser: nn.Module) -> None:
    if any(isinstance(forward, _RootAttachment) for forward in forwards(denoiser)):
        raise AlreadyAppliedError(
            f"this {type(denoiser).__name__} already carries a policy; call remove() on the first Guard, then "
            "apply the second policy"
        )
