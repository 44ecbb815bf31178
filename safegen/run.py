"""One run of the pipeline, seen from its denoiser: gating before each step, coverage and effects after it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safegen.backend.base import Backend, Call
from safegen.backend.conditioning import Origin, TextSeam, fingerprint
from safegen.backend.injection import Injection, Opening
from safegen.errors import AttestationError, PromptRefused, SafegenError
from safegen.gatekeeper import Decision, Gatekeeper
from safegen.record import Recorder

_MEASURED_EVERY = 8  # steps between measurements of the effect; the first step is always measured


@dataclass(slots=True)
class Run:
    """The state of one run.

    Attributes:
        owner: The `Runs` that follows it.
        request: Id that joins the run's records.
        timestep: Timestep of the last call.
        states: Conditioning of the last call; kept so that a change is noticed.
        version: Version counter of `states`, which grows when it is written in place.
        origins: Where each row came from.
        decisions: One per row.
        permeability: γ, [rows, membranes]; all 0 where the policy only observes.
        started: `time.perf_counter` at the first call.
        calls: Denoiser calls so far.
        fired: Site firings so far.
        effects: Sum of measured effects, [rows, membranes].
        measured: How many calls `effects` sums over.
        closed: Whether its images have been recorded.
    """

    owner: object
    request: str
    timestep: float
    states: Tensor
    version: int
    origins: list[Origin | None]
    decisions: list[Decision]
    permeability: Tensor
    started: float
    calls: int = 0
    fired: int = 0
    effects: Tensor = field(default_factory=lambda: torch.zeros(0))
    measured: int = 0
    closed: bool = False

    def effect(self, row: int) -> list[float] | None:
        """Returns the mean measured effect of each membrane on a row; None where nothing was measured."""
        return (self.effects[row] / self.measured).tolist() if self.measured else None


_current: ContextVar[Run | None] = ContextVar("safegen_run", default=None)


class Runs:
    """Follows the runs on one denoiser; each thread or task has its own."""

    def __init__(
        self, backend: Backend, gatekeeper: Gatekeeper, injection: Injection, seam: TextSeam, recorder: Recorder
    ) -> None:
        self._backend = backend
        self._gatekeeper = gatekeeper
        self._injection = injection
        self._seam = seam
        self._recorder = recorder

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opening:
        """Reads the conditioning of a call, decides, records before anything is drawn, and says what is open.

        Raises:
            PromptRefused: A rule refuses; nothing was drawn.
            AttestationError: The membranes are not in place.
            AuditWriteError: The decision could not be recorded.
        """
        call = self._backend.call(args, kwargs)
        run = _current.get()
        fresh = run is None or run.owner is not self or run.closed or call.timestep > run.timestep
        if run is None or fresh:
            self._prove_attachment()
            run = self._gate(call, f"req-{uuid.uuid4().hex}")
        elif call.states is not run.states or call.states._version != run.version:
            run = self._regate(call, run)
        run.timestep = call.timestep
        _current.set(run)
        measure = run.calls % _MEASURED_EVERY == 0
        return Opening.of(run.permeability, self._gatekeeper.strengths, measure=measure)

    def _prove_attachment(self) -> None:
        self._injection.check()
        if not self._seam.attached:
            raise AttestationError(
                "the text encoder no longer reports to safegen (its forward was overwritten), so prompts cannot be "
                "read; remove what did that and apply the policy again"
            )

    def _regate(self, call: Call, run: Run) -> Run:
        """Gates again where the conditioning changed during a run (step callbacks, prompt scheduling)."""
        same = call.states.shape == run.states.shape and call.states._version == run.version
        if same and torch.equal(call.states, run.states):
            run.states = call.states
            return run
        again = self._gate(call, run.request)
        again.started, again.calls, again.fired = run.started, run.calls, run.fired
        return again

    def _gate(self, call: Call, request: str) -> Run:
        origins = [self._seam.origin(fingerprint(row)) for row in call.states]
        decisions = self._gatekeeper.decide(call.states, origins)
        enforce = self._gatekeeper.policy.mode == "enforce"
        refused = [d for d in decisions if d.outcome == "refuse"]
        if refused and enforce:
            self._recorder.refused(request, decisions, origins)
            raise PromptRefused(_message(refused), _as_values(refused[0]))
        permeability = self._gatekeeper.permeability(decisions)
        if not enforce:
            permeability = torch.zeros_like(permeability)
        run = Run(
            owner=self,
            request=request,
            timestep=call.timestep,
            states=call.states,
            version=call.states._version,
            origins=origins,
            decisions=decisions,
            permeability=permeability,
            started=time.perf_counter(),
        )
        self._recorder.gated(run.request, decisions, origins)
        return run

    def after(self, opening: Opening) -> None:
        """Counts a finished call and keeps what it measured."""
        run = _current.get()
        if run is None or run.owner is not self:
            return
        run.calls += 1
        run.fired += len(opening.fired)
        if opening.effects:
            mean = torch.stack(opening.effects).mean(dim=0)
            if not run.measured:
                run.effects = torch.zeros(run.permeability.shape)
            rows = torch.arange(len(run.effects)) if opening.rows is None else opening.rows.cpu()
            for column, membrane in enumerate(opening.membranes):
                run.effects[rows, membrane] += mean[:, column]
            run.measured += 1

    def failed(self, error: SafegenError) -> None:
        """Records a run that safegen itself stopped."""
        run = _current.get()
        request = run.request if run is not None and run.owner is self else f"req-{uuid.uuid4().hex}"
        if not isinstance(error, PromptRefused):
            self._recorder.failed(request, error)
        if run is not None:
            run.closed = True

    def drawn(self, digests: tuple[str, ...]) -> None:
        """Records the images of the current run; decoding outside of a run is not the guard's business."""
        run = _current.get()
        if run is None or run.owner is not self or run.closed:
            return
        run.closed = True
        self._recorder.generated(run, digests, _rows_of_images(run.origins, len(digests)))


def _rows_of_images(origins: Sequence[Origin | None], images: int) -> list[int]:
    """Returns the row of conditioning that each image was drawn from.

    With guidance the denoiser gets unconditional rows too: [unconditional…, conditional…]. They are told by having been
    encoded as negative prompts; where that is unknown, the last rows are the conditional ones, as diffusers stacks
    them.
    """
    conditional = [k for k, origin in enumerate(origins) if origin is None or not origin.negative]
    return conditional if len(conditional) == images else list(range(len(origins)))[-images:]


def _message(refused: Sequence[Decision]) -> str:
    reasons = list(dict.fromkeys(decision.reason for decision in refused))
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    rule = refused[0].rule
    return f"refused{f' by rule {rule.id!r}' if rule else ''}: {reasons[0]}{more}; nothing was drawn"


def _as_values(decision: Decision) -> dict[str, object]:
    return {
        "outcome": decision.outcome,
        "rule": decision.rule.id if decision.rule else None,
        "concept": decision.rule.concept.id if decision.rule else None,
        "severity": decision.rule.severity.value if decision.rule else None,
        "reason": decision.reason,
        "hits": [hit.phrase for hit in decision.hits],
    }
