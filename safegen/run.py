"""One run of the pipeline, seen from its denoiser: gating before each step, coverage and effects after it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from safegen.backend.base import Backend, Call, Input
from safegen.backend.conditioning import NOTHING, Encoding, Origin, TextSeam
from safegen.backend.injection import Injection, Opening
from safegen.backend.watch import Start, take_start
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
        states: Conditioning of the last call.
        version: Version counter of `states`, which grows when it is written in place; -1 where there is none.
        kept: Copy of the conditioning that was decided on.
        foreign: Whether the denoiser reads other conditioning too.
        seen: What this thread had encoded last.
        encoding: What holds for this run of all that was encoded for it.
        origins: Where each row came from.
        decisions: One per row.
        opening: What the membranes do to its rows; nothing where the policy only observes, or they are merged.
        start: Seeds and images that it began from.
        inputs: What else than words it draws from.
        started: `time.perf_counter` at the first call.
        calls: Denoiser calls so far.
        effects: Sum of measured effects, [rows, membranes].
        measured: How many calls `effects` sums over.
        closed: Whether its images have been recorded.
    """

    owner: object
    request: str
    timestep: float
    states: Tensor
    version: int
    kept: Tensor
    foreign: bool
    seen: Encoding
    encoding: Encoding
    origins: list[Origin | None]
    decisions: list[Decision]
    opening: Opening
    start: Start
    inputs: tuple[Input, ...]
    started: float
    calls: int = 0
    effects: Tensor = field(default_factory=lambda: torch.zeros(0))
    measured: int = 0
    closed: bool = False

    def effect(self, row: int) -> list[float] | None:
        """Returns the mean measured effect of each membrane on a row; None where nothing was measured."""
        return (self.effects[row] / self.measured).tolist() if self.measured else None

    def reads(self, call: Call) -> bool:
        """Tells whether a call's conditioning is, in every value, what was decided on."""
        states = call.states
        if call.foreign != self.foreign:
            return False
        if states is self.states and _version(states) == self.version >= 0:
            return True
        self.states, self.version = states, _version(states)
        return torch.equal(states, self.kept)


def _version(states: Tensor) -> int:
    return -1 if states.is_inference() else states._version


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
        run = self._followed(call)
        run.timestep = call.timestep
        _current.set(run)
        return run.opening.again(measure=run.calls % _MEASURED_EVERY == 0 or not run.measured)

    def prove(self, replaced: Sequence[str] = ()) -> None:
        """Proves, before a run, that the guard is in place; where it is not, that is recorded as a failed run.

        Args:
            replaced: Names of the pipeline's parts that are no longer those that were guarded.

        Raises:
            AttestationError: Says what is not in place.
        """
        try:
            self._prove_attachment(replaced)
        except SafegenError as error:
            _current.set(None)
            self.failed(error)
            raise

    def _prove_attachment(self, replaced: Sequence[str] = ()) -> None:
        if replaced:
            raise AttestationError(
                f"pipe.{replaced[0]} was replaced since the policy was applied, and the new one is not guarded; call "
                "remove() on the Guard and apply the policy again"
            )
        self._injection.check()
        if not self._seam.attached:
            raise AttestationError(
                "the text encoder no longer reports to safegen (its forward was overwritten), so prompts cannot be "
                "read; remove what did that and apply the policy again"
            )

    def _followed(self, call: Call) -> Run:
        """Returns the run that a call belongs to: the one in progress, or a new one.

        A run goes down in timesteps. What was encoded since the last call, and conditioning that changed (step
        callbacks, prompt scheduling), is decided on and recorded again.
        """
        run, seen = _current.get(), self._seam.last()
        if run is None or run.owner is not self or run.closed or _starts_again(call, run):
            stale = run is not None and seen is run.seen  # encoded for an earlier run
            _current.set(None)
            return self._gate(call, f"req-{uuid.uuid4().hex}", seen, NOTHING if stale else seen, take_start(seen))
        if seen is run.seen and run.reads(call):
            return run
        encoding = run.encoding if seen is run.seen else seen.following(run.encoding)
        again = self._gate(call, run.request, seen, encoding, run.start)
        again.started, again.calls = run.started, run.calls
        return again

    def _origins(self, call: Call, encoding: Encoding) -> list[Origin | None]:
        origins = [self._seam.trace(row, encoding) for row in call.states]
        if call.foreign:  # the words are not all that the denoiser reads
            origins = [origin if origin is not None and origin.negative else None for origin in origins]
        if all(origin is not None and origin.negative for origin in origins):  # not guidance: nothing else is drawn
            return [replace(origin, negative=False) for origin in origins if origin is not None]
        return origins

    def _gate(self, call: Call, request: str, seen: Encoding, encoding: Encoding, start: Start) -> Run:
        self._prove_attachment()
        origins = self._origins(call, encoding)
        with self._seam.unseen():
            decisions = self._gatekeeper.decide(call.states, origins)
        enforce = self._gatekeeper.policy.mode == "enforce"
        inputs = tuple(dict.fromkeys((*start.inputs, *call.inputs)))
        refused = [d for d in decisions if d.outcome == "refuse"]
        if refused and enforce:
            self._recorder.refused(request, decisions, origins, inputs)
            raise PromptRefused(_message(refused), _as_values(refused[0]))
        permeability = self._gatekeeper.permeability(decisions)
        if not enforce or self._injection.merged:  # what is merged acts already
            permeability = torch.zeros_like(permeability)
        run = Run(
            owner=self,
            request=request,
            timestep=call.timestep,
            states=call.states,
            version=_version(call.states),
            kept=call.states.clone(),
            foreign=call.foreign,
            seen=seen,
            encoding=encoding,
            origins=origins,
            decisions=decisions,
            opening=Opening.of(permeability, self._gatekeeper.strengths),
            start=start,
            inputs=inputs,
            started=time.perf_counter(),
        )
        self._recorder.gated(run.request, decisions, origins, inputs)
        return run

    def after(self, opening: Opening) -> None:
        """Counts a finished call and keeps what it measured.

        Raises:
            AttestationError: A membrane was open, and did nothing.
        """
        run = _current.get()
        if run is None or run.owner is not self:
            return
        run.calls += 1
        if opening.effects:
            mean = torch.stack([effect.to(opening.effects[0].device) for effect in opening.effects]).mean(dim=0).cpu()
            if bool(((mean == 0) & (opening.coefficients != 0)).any()):
                raise AttestationError(
                    "a membrane was open, and its measured effect is 0 at every site; its factors are lost in this "
                    "model's number format, or the membrane is broken"
                )
            if not run.measured:
                run.effects = torch.zeros(opening.size, len(self._gatekeeper.installed))
            rows = torch.arange(opening.size)
            rows = rows if opening.rows is None else rows[opening.rows]
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


def _starts_again(call: Call, run: Run) -> bool:
    """Tells whether a call begins a run: its timestep goes up, or stays with other conditioning (one-step samplers)."""
    return call.timestep > run.timestep or (call.timestep == run.timestep and call.states is not run.states)


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
