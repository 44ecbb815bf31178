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

_MEASURED_EVERY = 8  # calls between measurements of the effect; the first call of a conditioning is always measured
_BRANCHES_KEPT = 7  # conditionings that a run goes back to without deciding on them again


@dataclass(slots=True)
class Branch:
    """One conditioning that a run draws with: all its rows, or those of the prompts or of the negative prompts alone.

    Attributes:
        call: The call that it was decided for; its tensors as the host passed them last.
        versions: Version counters of these, which grow when they are written in place; -1 where there is none.
        kept: Copies of what was decided on.
        origins: Where each row came from.
        decisions: One per row.
        opening: What the membranes do to its rows; nothing where the policy only observes, or they are merged.
        timestep: Timestep of its last call.
        turn: How many calls of the run came before that one.
        effects: Sum of measured effects, [rows, membranes].
        measured: How many calls `effects` sums over.
        calls: Calls with it so far.
    """

    call: Call
    versions: tuple[int, ...]
    kept: tuple[Tensor, ...]
    origins: list[Origin | None]
    decisions: list[Decision]
    opening: Opening
    timestep: float
    turn: int = 0
    effects: Tensor = field(default_factory=lambda: torch.zeros(0))
    measured: int = 0
    calls: int = 0

    def effect(self, row: int) -> list[float] | None:
        """Returns the mean measured effect of each membrane on a row; None where nothing was measured."""
        return (self.effects[row] / self.measured).tolist() if self.measured else None

    def holds(self, call: Call) -> bool:
        """Tells whether a call passes the very tensors that were decided on, unchanged."""
        return (
            _beside(call) == _beside(self.call)
            and len(call.tensors) == len(self.call.tensors)
            and all(
                new is old and _version(new) == version >= 0
                for new, old, version in zip(call.tensors, self.call.tensors, self.versions, strict=True)
            )
        )

    def reads(self, call: Call) -> bool:
        """Tells whether a call's conditioning is, in every value, what was decided on."""
        if _beside(call) != _beside(self.call) or len(call.tensors) != len(self.kept):
            return False
        if not all(torch.equal(new, kept) for new, kept in zip(call.tensors, self.kept, strict=True)):
            return False
        self.call, self.versions = call, tuple(map(_version, call.tensors))
        return True


@dataclass(slots=True)
class Run:
    """The state of one run.

    Attributes:
        owner: The `Runs` that follows it.
        request: Id that joins the run's records.
        seen: What this thread had encoded last.
        encoding: What holds for this run of all that was encoded for it.
        start: Seeds and images that it began from.
        started: `time.perf_counter` at the first call.
        timestep: Timestep of the last call.
        branches: The conditionings decided on, in order of their first call.
        branch: That of the last call.
        calls: Denoiser calls so far.
        closed: Whether its images have been recorded.
    """

    owner: object
    request: str
    seen: Encoding
    encoding: Encoding
    start: Start
    started: float
    timestep: float
    branches: list[Branch]
    branch: Branch
    calls: int = 0
    closed: bool = False

    def drawn_with(self) -> Branch:
        """Returns the conditioning that the images follow: of those of the last step, the first that holds prompts."""
        last = sorted((b for b in self.branches if b.timestep == self.timestep), key=lambda branch: branch.turn)
        return next((branch for branch in last if not _negative(branch.origins)), last[0])

    def prompts(self) -> list[Decision]:
        """Returns what was decided for the run's prompts last; nothing where no call has held them yet."""
        branch = next((branch for branch in reversed(self.branches) if not _negative(branch.origins)), None)
        rows = zip(branch.decisions, branch.origins, strict=True) if branch is not None else ()
        return [decision for decision, origin in rows if origin is None or not origin.negative]


def _negative(origins: Sequence[Origin | None]) -> bool:
    return all(origin is not None and origin.negative for origin in origins)


def _beside(call: Call) -> tuple[bool, frozenset[Input]]:
    """Returns what a call reads beside words."""
    return call.foreign, frozenset(call.inputs)


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
        branch = run.branch
        run.timestep = branch.timestep = call.timestep
        branch.turn = run.calls
        _current.set(run)
        return branch.opening.again(measure=branch.calls % _MEASURED_EVERY == 0 or not branch.measured)

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

        A run goes down in timesteps, with one call a step or with one for each branch of guidance. What was encoded
        since the last call, and conditioning that changed (step callbacks, prompt scheduling), is decided on and
        recorded again.
        """
        run, seen = _current.get(), self._seam.last()
        if run is None or run.owner is not self or run.closed or self._starts_again(call, run, seen):
            stale = run is not None and seen is run.seen  # encoded for an earlier run
            _current.set(None)
            encoding, start = NOTHING if stale else seen, take_start(seen)
            branch = self._gate(call, request := f"req-{uuid.uuid4().hex}", encoding, start)
            return Run(self, request, seen, encoding, start, time.perf_counter(), call.timestep, [branch], branch)
        if seen is run.seen:
            # Where there are no branches every change is decided on again, also a change back.
            candidates = [run.branch] if self._backend.capabilities.calls == 1 else run.branches
            known = next((b for b in candidates if b.holds(call)), None)
            known = known or next((b for b in candidates if b.reads(call)), None)
            if known is not None:
                if known is not run.branch:
                    known.opening.fired_before.clear()  # what a step cache holds now may be the other branch's
                    run.branch = known
                return run
        else:
            run.seen, run.encoding = seen, seen.following(run.encoding)
            run.branches.clear()
        run.branch = self._gate(call, run.request, run.encoding, run.start, run.prompts())
        # Negative prompts follow the prompts (`guidance: both`), so that they are decided on again after new ones.
        kept = [b for b in run.branches if _negative(run.branch.origins) or not _negative(b.origins)]
        run.branches = [*kept[-_BRANCHES_KEPT:], run.branch]
        return run

    def _starts_again(self, call: Call, run: Run, seen: Encoding) -> bool:
        """Tells whether a call begins a run: its timestep goes up, or stays, and it is no branch of the same step.

        Samplers with a single step stay at its timestep. A call with other conditioning is a branch of guidance there
        where the family makes several calls a step, nothing was encoded in between, and it has not made them all.
        """
        if call.timestep != run.timestep:
            return call.timestep > run.timestep
        if any(branch.call.tensors[0] is call.tensors[0] for branch in run.branches):
            return False
        if self._backend.capabilities.calls == 1 or seen is not run.seen:
            return True
        return sum(branch.timestep == run.timestep for branch in run.branches) >= self._backend.capabilities.calls

    def _origins(self, call: Call, encoding: Encoding) -> list[Origin | None]:
        rows = range(len(call.states))
        origins = [self._seam.trace([(s.encoder, s.rows[k]) for s in call.strands], encoding) for k in rows]
        if call.foreign:  # the words are not all that the denoiser reads
            origins = [origin if origin is not None and origin.negative else None for origin in origins]
        if _negative(origins) and self._backend.capabilities.calls == 1:  # not guidance: nothing else is drawn
            return [replace(origin, negative=False) for origin in origins if origin is not None]
        return origins

    def _gate(
        self, call: Call, request: str, encoding: Encoding, start: Start, prompts: Sequence[Decision] = ()
    ) -> Branch:
        self._prove_attachment()
        origins = self._origins(call, encoding)
        with self._seam.unseen():
            decisions = self._gatekeeper.decide(call.states, origins, prompts=prompts)
        enforce = self._gatekeeper.policy.mode == "enforce"
        inputs = tuple(dict.fromkeys((*start.inputs, *call.inputs)))
        refused = [d for d in decisions if d.outcome == "refuse"]
        if refused and enforce:
            self._recorder.refused(request, decisions, origins, inputs)
            raise PromptRefused(_message(refused), _as_values(refused[0]))
        permeability = self._gatekeeper.permeability(decisions)
        if not enforce or self._injection.merged:  # what is merged acts already
            permeability = torch.zeros_like(permeability)
        branch = Branch(
            call=call,
            versions=tuple(map(_version, call.tensors)),
            kept=tuple(given.clone() for given in call.tensors),
            origins=origins,
            decisions=decisions,
            opening=Opening.of(permeability, self._gatekeeper.strengths),
            timestep=call.timestep,
        )
        self._recorder.gated(request, decisions, origins, inputs)
        return branch

    def after(self, opening: Opening) -> None:
        """Counts a finished call and keeps what it measured.

        Raises:
            AttestationError: A membrane was open, and did nothing.
        """
        run = _current.get()
        if run is None or run.owner is not self:
            return
        run.calls += 1
        branch = run.branch
        branch.calls += 1
        if opening.effects:
            mean = torch.stack([effect.to(opening.effects[0].device) for effect in opening.effects]).mean(dim=0).cpu()
            if bool(((mean == 0) & (opening.coefficients != 0)).any()):
                raise AttestationError(
                    "a membrane was open, and its measured effect is 0 at every site; its factors are lost in this "
                    "model's number format, or the membrane is broken"
                )
            if not branch.measured:
                branch.effects = torch.zeros(opening.size, len(self._gatekeeper.installed))
            rows = torch.arange(opening.size)
            rows = rows if opening.rows is None else rows[opening.rows]
            for column, membrane in enumerate(opening.membranes):
                branch.effects[rows, membrane] += mean[:, column]
            branch.measured += 1

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
        branch = run.drawn_with()
        self._recorder.generated(run, branch, digests, _rows_of_images(branch.origins, len(digests)))


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
