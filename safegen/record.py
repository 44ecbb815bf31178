"""Turns what the guard decided and saw into audit records: finished values only, never tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from safegen.audit import (
    ActionRecord,
    AttestRecord,
    AuditLog,
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
from safegen.audit.events import EventFields, EventKind
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
        self._log = log
        self._policy = policy
        self._gatekeeper = gatekeeper
        self._sites = len(injection.site_names)
        self._model = ModelRecord(family, source)
        self._policy_record = PolicyRecord(policy.id, policy.version, f"sha256:{policy.digest}", policy.mode)

    def _keep(self, kind: EventKind, fields: EventFields) -> None:
        try:
            self._log.write(kind, model=self._model, **fields)
        except AuditWriteError as error:
            if self._policy.mode == "observe" and self._policy.audit.on_failure == "degrade":
                self.degraded = True
                logger.error("audit degraded, a record was lost: %s", error)
                return
            raise

    def applied(self) -> None:
        """Records that the policy is in force, after everything was attached; in mode `disabled` nothing is."""
        disabled = self._policy.mode == "disabled"
        membranes = tuple(_membrane(item) for item in self._gatekeeper.installed)
        attest = AttestRecord(modules_expected=self._sites, modules_seen=0) if disabled else self._attest()
        self._keep("policy.applied", EventFields(policy=self._policy_record, membranes=membranes, attest=attest))

    def removed(self) -> None:
        """Records that the policy was taken off."""
        self._keep("policy.removed", EventFields(policy=self._policy_record))

    def gated(self, request: str, decisions: Sequence[Decision], origins: Sequence[Origin | None]) -> None:
        """Records the decision on every distinct prompt, before anything is drawn."""
        enforced = self._policy.mode == "enforce"
        for decision in _distinct(decisions, origins):
            fields = self._decided(request, decision, origins)
            fields["action"] = _action(decision, enforced=enforced)
            fields["attest"] = self._attest()
            self._keep("gated", fields)

    def refused(self, request: str, decisions: Sequence[Decision], origins: Sequence[Origin | None]) -> None:
        """Records every prompt of a call that was refused; nothing is drawn for any of them."""
        for decision in _distinct(decisions, origins):
            fields = self._decided(request, decision, origins)
            fields["action"] = ActionRecord(type="refuse", enforced=True)
            self._keep("refused", fields)

    def failed(self, request: str, error: SafegenError) -> None:
        """Records a run that safegen stopped."""
        failure = self._log.failure(type(error).__name__, error)
        fields = EventFields(request=RequestRecord(request), policy=self._policy_record, error=failure)
        self._keep("run.failed", fields)

    def generated(self, run: Run, branch: Branch, digests: Sequence[str], rows: Sequence[int]) -> None:
        """Records the images of a run, one record per distinct prompt of the branch that they follow."""
        images: dict[int, list[str]] = {}
        first: dict[object, int] = {}
        for row, digest in zip(rows, digests, strict=True):
            images.setdefault(first.setdefault(_prompt_key(row, branch.decisions[row]), row), []).append(digest)
        elapsed = 1000 * (time.perf_counter() - run.started)
        for row, found in images.items():
            decision = branch.decisions[row]
            fields = EventFields(
                request=RequestRecord(run.request),
                policy=self._policy_record,
                membranes=self._membranes(decision, branch.effect(row)),
                attest=self._attest(calls=run.calls),
                output=OutputRecord(n=len(found), sha256=tuple(found)),
                timing_ms=elapsed,
            )
            if decision.text is not None:
                fields["prompt"] = self._log.prompt(decision.text, decoded=decision.decoded)
            self._keep("generated", fields)

    def _decided(self, request: str, decision: Decision, origins: Sequence[Origin | None]) -> EventFields:
        """Returns what `gated` and `refused` have in common."""
        fields = EventFields(
            request=RequestRecord(request),
            policy=self._policy_record,
            inputs=() if decision.text is not None else ("embeds_only",),
            membranes=self._membranes(decision),
            hits=tuple(self._log.hit(hit.rule, hit.concept, hit.phrase) for hit in decision.hits),
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
        return AttestRecord(modules_expected=self._sites, modules_seen=self._sites, calls=calls)

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
        decision="clear" if decision.outcome == "allow" else "match",
        rule=rule.id if rule else None,
        severity=rule.severity.value if rule else None,
    )


def _action(decision: Decision, *, enforced: bool) -> ActionRecord:
    if enforced:
        return ActionRecord(type=decision.outcome, enforced=True)
    return ActionRecord(type="allow", enforced=False, would=decision.outcome)
