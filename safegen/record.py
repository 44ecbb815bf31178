"""Turns what the guard decided and saw into audit records: finished values only, never tensors."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from safegen.audit import (
    ActionRecord,
    AttestRecord,
    AuditLog,
    ExceptionRecord,
    GapRecord,
    MembraneRecord,
    ModelRecord,
    OutputRecord,
    PolicyRecord,
    RequestRecord,
    ScoreRecord,
    ThresholdRecord,
    TriggerRecord,
    VerdictRecord,
)
from safegen.audit.chain import utc_now
from safegen.audit.events import EventFields, EventKind, InputKind
from safegen.backend.base import Input
from safegen.backend.conditioning import Origin
from safegen.backend.injection import Injection
from safegen.decision import Activation, Decision, Installed
from safegen.errors import AuditWriteError, SafegenError
from safegen.gatekeeper import Gatekeeper
from safegen.policy.resolve import ResolvedPolicy

if TYPE_CHECKING:
    from safegen.run import Branch, Run

logger = logging.getLogger("safegen")


class Recorder:
    """Writes the records of one guard.

    Attributes:
        degraded: Whether a record was lost; only in mode `observe` with `on_failure: degrade`, elsewhere a record that
            cannot be written stops the run.
    """

    def __init__(
        self,
        log: AuditLog,
        policy: ResolvedPolicy,
        gatekeeper: Gatekeeper,
        injection: Injection,
        *,
        family: str,
        source: str,
    ) -> None:
        self.degraded = False
        self._lost, self._since = 0, ""
        self._lock = threading.Lock()
        self._log = log
        self._policy = policy
        self._gatekeeper = gatekeeper
        self._sites = len(injection.site_names)
        self._composition = "static" if injection.merged else "runtime"
        self._model = ModelRecord(family, source)
        self._policy_record = PolicyRecord(policy.id, policy.version, f"sha256:{policy.digest}", policy.mode)

    def _keep(self, kind: EventKind, fields: EventFields) -> None:
        if self._policy.mode != "observe" or self._policy.audit.on_failure != "degrade":
            self._log.write(kind, model=self._model, **fields)
            return
        try:
            self._report_gap()
            self._log.write(kind, model=self._model, **fields)
        except AuditWriteError as error:
            with self._lock:
                self._lost, self._since = self._lost + 1, self._since or utc_now()
            self.degraded = True
            logger.error("audit degraded, a record was lost: %s", error)

    def _report_gap(self) -> None:
        """Records, as soon as writing works again, how many records are missing."""
        if not self._lost:
            return
        with self._lock:
            if self._lost:  # no other thread has reported it meanwhile
                self._log.resume()
                gap = GapRecord(self._lost, self._since)
                self._log.write("audit.gap", model=self._model, policy=self._policy_record, gap=gap)
                self._lost, self._since = 0, ""

    def applied(self) -> None:
        """Records that the policy is in force, after everything was attached; in mode `disabled` nothing is."""
        disabled = self._policy.mode == "disabled"
        membranes = tuple(_membrane(item) for item in self._gatekeeper.installed)
        attest = AttestRecord(modules_expected=self._sites, modules_seen=0) if disabled else self._attest()
        self._keep("policy.applied", EventFields(policy=self._policy_record, membranes=membranes, attest=attest))

    def removed(self) -> None:
        """Records that the policy was taken off."""
        self._keep("policy.removed", EventFields(policy=self._policy_record))

    def gated(
        self, request: str, decisions: Sequence[Decision], origins: Sequence[Origin | None], inputs: Sequence[Input]
    ) -> None:
        """Records the decision on every distinct prompt, before anything is drawn."""
        enforced = self._policy.mode == "enforce"
        for decision in _distinct(decisions, origins):
            fields = self._decided(request, decision, origins, inputs)
            fields["action"] = _action(decision, enforced=enforced)
            fields["attest"] = self._attest()
            self._keep("gated", fields)

    def refused(
        self, request: str, decisions: Sequence[Decision], origins: Sequence[Origin | None], inputs: Sequence[Input]
    ) -> None:
        """Records every prompt of a call that was refused; nothing is drawn for any of them."""
        for decision in _distinct(decisions, origins):
            fields = self._decided(request, decision, origins, inputs)
            fields["action"] = ActionRecord(type="refuse", enforced=True)
            self._keep("refused", fields)

    def failed(self, request: str, error: SafegenError) -> None:
        """Records a run that safegen stopped."""
        failure = self._log.failure(type(error).__name__, error)
        fields = EventFields(request=_request(request), policy=self._policy_record, error=failure)
        self._keep("run.failed", fields)

    def generated(self, run: Run, branch: Branch, digests: Sequence[str], rows: Sequence[int]) -> None:
        """Records the images of a run, one record per distinct prompt of the branch that they follow."""
        images: dict[int, list[int]] = {}
        first: dict[object, int] = {}
        for index, row in enumerate(rows):
            images.setdefault(first.setdefault(_prompt_key(row, branch.decisions[row]), row), []).append(index)
        elapsed = 1000 * (time.perf_counter() - run.started)
        for row, found in images.items():
            decision = branch.decisions[row]
            fields = EventFields(
                request=_request(run.request),
                policy=self._policy_record,
                membranes=self._membranes(decision, branch.effect(row)),
                attest=self._attest(calls=run.calls),
                output=_output([digests[k] for k in found], found, run.start.seeds),
                timing_ms=elapsed,
            )
            if decision.text is not None:
                fields["prompt"] = self._log.prompt(decision.text, decoded=decision.decoded)
            self._keep("generated", fields)

    def _decided(
        self, request: str, decision: Decision, origins: Sequence[Origin | None], inputs: Sequence[Input]
    ) -> EventFields:
        """Returns what `gated` and `refused` have in common."""
        fields = EventFields(
            request=_request(request),
            policy=self._policy_record,
            inputs=(*inputs, *(() if decision.text is not None else _NO_TEXT)),
            membranes=self._membranes(decision),
            hits=tuple(self._log.hit(hit.rule, hit.concept, hit.phrase) for hit in decision.hits),
            exceptions=tuple(ExceptionRecord(one.exception, one.rule, one.action) for one in decision.exceptions),
            truncated_tokens=decision.truncated,
            verdict=_verdict(decision),
        )
        if decision.text is not None:
            fields["prompt"] = self._log.prompt(decision.text, decoded=decision.decoded)
        negatives = {o.text for o in origins if o is not None and o.negative and o.text}
        if len(negatives) == 1:
            fields["negative"] = self._log.prompt(negatives.pop())
        return fields

    def _attest(self, calls: int | None = None) -> AttestRecord:
        """Returns the proof of attachment: reached only where every planned site was found in place (and fired)."""
        return AttestRecord(self._sites, self._sites, calls, self._composition)

    def _membranes(self, decision: Decision, effect: Sequence[float] | None = None) -> tuple[MembraneRecord, ...]:
        enforced = self._policy.mode == "enforce"
        return tuple(
            replace(
                _membrane(activation.installed),
                score=_score(activation),
                permeability=activation.permeability,
                opened=activation.opened and enforced,
                effect=effect[k] if effect is not None and activation.opened else None,
                thresholds=tuple(ThresholdRecord(s, c.lo, c.hi) for s, c in activation.target.curves.items()),
                triggers=tuple(TriggerRecord(t.start, t.end, t.by, t.weight, t.changes) for t in activation.triggers),
            )
            for k, activation in enumerate(decision.activations)
        )


_NO_TEXT: tuple[InputKind, ...] = ("embeds_only",)


def _request(request: str) -> RequestRecord:
    """Returns the call's id, with the trace that the host runs it in, if it traces at all."""
    api = sys.modules.get("opentelemetry.trace")  # the library is not ours to load
    context = api.get_current_span().get_span_context() if api is not None else None
    if context is None or not context.is_valid:
        return RequestRecord(request)
    return RequestRecord(request, f"{context.trace_id:032x}", f"{context.span_id:016x}")


def _output(digests: Sequence[str], images: Sequence[int], seeds: Sequence[int]) -> OutputRecord:
    """Returns the images of one prompt.

    Args:
        digests: Of these images.
        images: Their places among all images of the run.
        seeds: Of the run: one for all images, one per image, or none.
    """
    single = str(seeds[0]) if len(seeds) == 1 else None
    each = tuple(str(seeds[k]) for k in images) if len(seeds) > 1 and len(seeds) > max(images) else None
    return OutputRecord(n=len(digests), sha256=tuple(digests), seed=single, seeds=each)


def _score(activation: Activation) -> ScoreRecord:
    score = activation.score
    return ScoreRecord(score.clipcos, score.token, score.lexical, score.direction, score.semantic)


def _membrane(item: Installed) -> MembraneRecord:
    return MembraneRecord(item.rule.id, item.rule.concept.id, item.sha256, item.rule.strength)


def _distinct(decisions: Sequence[Decision], origins: Sequence[Origin | None]) -> list[Decision]:
    """Returns one decision per distinct prompt; rows encoded as negative prompts are not prompts."""
    kept = [(k, d) for k, (d, o) in enumerate(zip(decisions, origins, strict=True)) if o is None or not o.negative]
    return list({_prompt_key(k, decision): decision for k, decision in kept}.values())


def _prompt_key(row: int, decision: Decision) -> object:
    """Rows with the same text are one prompt; rows of unknown text are each their own."""
    return decision.text if decision.text is not None else row


def _verdict(decision: Decision) -> VerdictRecord:
    rule = decision.rule
    return VerdictRecord(
        decision=decision.verdict,
        rule=rule.id if rule else None,
        severity=rule.severity.value if rule else None,
    )


def _action(decision: Decision, *, enforced: bool) -> ActionRecord:
    if enforced:
        return ActionRecord(type=decision.outcome, enforced=True)
    return ActionRecord(type="allow", enforced=False, would=decision.outcome)
