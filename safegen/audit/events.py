"""The records of schema `safegen.audit/1`.

The schema is additive: later versions may add fields and kinds under the same `v`, so a reader ignores fields it does
not know and checks only the envelope of a kind it does not know. An absent field means "not recorded"; an empty list
means "looked at, none".

Every value is finite and plain (`safegen.audit.plain`): a tensor, NaN or Inf raises `AuditWriteError` where the record
is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from safegen.audit.plain import Plain

EventKind = Literal["policy.applied", "policy.removed", "gated", "generated", "refused", "run.failed", "audit.gap"]
InputKind = Literal["image", "mask", "control", "ip_adapter", "embeds_only"]


@dataclass(frozen=True, slots=True)
class RequestRecord(Plain):
    """One call of the host.

    Attributes:
        id: Joins the records of that call: one `gated` record per prompt, one `generated`.
        trace_id: OpenTelemetry's id of the trace that the call belongs to, 32 hex digits; absent outside of one.
        span_id: Its id of the span, 16 hex digits.
    """

    id: str
    trace_id: str | None = None
    span_id: str | None = None


@dataclass(frozen=True, slots=True)
class ModelRecord(Plain):
    """The base model: `family` (such as `sd1`) and `source` (folder, or hub name with its revision)."""

    family: str
    source: str


@dataclass(frozen=True, slots=True)
class RuntimeVersions(Plain):
    """Versions of the libraries that draw, as plain strings; the audit layer never imports them."""

    torch: str | None = None
    diffusers: str | None = None


@dataclass(frozen=True, slots=True)
class RuntimeRecord(Plain):
    """What ran: the versions, the process that wrote the record and the model in question."""

    safegen: str
    pid: int
    torch: str | None = None
    diffusers: str | None = None
    model: ModelRecord | None = None


@dataclass(frozen=True, slots=True)
class PolicyRecord(Plain):
    """The policy in force. `digest` is `sha256:<hex>` of its resolved form; `mode` is `enforce` or `observe`."""

    id: str
    version: str
    digest: str
    mode: str


@dataclass(frozen=True, slots=True)
class PromptRecord(Plain):
    """A prompt as the log keeps it; build it with `AuditLog.prompt`, which knows whether the text may be kept.

    Attributes:
        hmac: HMAC of the NFC form of the prompt, 64 hex digits.
        key_id: Which key made it.
        alg: `HMAC-SHA256`.
        chars: Length of the prompt in code points, before NFC.
        text: The prompt itself; only in a log opened with `text="full"`.
        redacted: What the host's redactor left of it; only in a log opened with `text="redacted"`.
        redaction_failed: True where the redactor failed, so that the text was dropped.
        decoded: True where the caller's own text was not seen, and the digest is of what the token ids decode to.
    """

    hmac: str
    key_id: str
    alg: str
    chars: int
    text: str | None = None
    decoded: bool | None = None
    redacted: str | None = None
    redaction_failed: bool | None = None


@dataclass(frozen=True, slots=True)
class ScoreRecord(Plain):
    """The parts of a score, each absent where it was not computed.

    Attributes:
        clipcos: Cosine of text encodings, in [-1, 1] (SPM, facilitated transport).
        token: Token overlap, in [0, 1] (SPM Eq. 10).
        lexical: 1 where a whole phrase of the concept was found, else 0.
        direction: Cosine of what prompt and concept change in the text encoding, in [-1, 1].
        semantic: Cosine of sentence encodings, in [-1, 1].
    """

    clipcos: float | None = None
    token: float | None = None
    lexical: float | None = None
    direction: float | None = None
    semantic: float | None = None


@dataclass(frozen=True, slots=True)
class ThresholdRecord(Plain):
    """The thresholds that a score was held against: shut below `lo`, fully open from `hi` on, both in [-1, 1]."""

    score: str
    lo: float
    hi: float


@dataclass(frozen=True, slots=True)
class TriggerRecord(Plain):
    """A place in the prompt that opened a membrane: numbers only, the words themselves would reveal the prompt.

    Attributes:
        start: Offset of its first character, in code points.
        end: Offset after its last character.
        by: `lexical`, a whole phrase; `evidence`, tokens without which the score falls.
        weight: 1 for a phrase; for tokens, how far the score falls without them.
        normalised: What had to be normalised to find a phrase.
    """

    start: int
    end: int
    by: str
    weight: float
    normalised: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MembraneRecord(Plain):
    """One membrane and, in `gated`, `generated` and `refused`, how far the prompt opened it.

    Attributes:
        rule: Id of the policy rule that holds it.
        concept: The concept it erases.
        sha256: Digest of its file, 64 hex digits.
        strength: The policy author's constant, >= 0.
        score: What the permeability was computed from; absent where the prompt was unknown.
        permeability: The intent, in [0, 1].
        opened: Whether the membrane acted on this prompt (permeability above 0).
        effect: The measured ratio ‖γ s Δ(x)‖ / ‖W x‖, >= 0.
        thresholds: What the graded scores were held against.
        triggers: The places in the prompt that opened it.
    """

    rule: str
    concept: str
    sha256: str
    strength: float
    score: ScoreRecord | None = None
    permeability: float | None = None
    opened: bool | None = None
    effect: float | None = None
    thresholds: tuple[ThresholdRecord, ...] | None = None
    triggers: tuple[TriggerRecord, ...] | None = None


@dataclass(frozen=True, slots=True)
class HitRecord(Plain):
    """A lexical rule that matched. `text`, the matched words, only with `text="full"`: they would reveal the prompt."""

    rule: str
    concept: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class ExceptionRecord(Plain):
    """An exception that made a difference: its id, the rule that is touched, and what that rule does instead."""

    id: str
    rule: str
    action: str


@dataclass(frozen=True, slots=True)
class VerdictRecord(Plain):
    """What was found. `rule` and `severity` are those of the gravest finding, absent where nothing matched."""

    decision: str
    rule: str | None = None
    severity: str | None = None


@dataclass(frozen=True, slots=True)
class ActionRecord(Plain):
    """What was done. In `observe` nothing is enforced, and `would` names what `enforce` would have done."""

    type: str
    enforced: bool
    would: str | None = None


@dataclass(frozen=True, slots=True)
class AttestRecord(Plain):
    """Proof of attachment: how many sites were planned, how many carried their membrane, how many calls they saw.

    `composition` is `runtime` (membranes opened per row, as they were needed) or `static` (merged once, for every row).
    """

    modules_expected: int
    modules_seen: int
    calls: int | None = None
    composition: str | None = None


@dataclass(frozen=True, slots=True)
class OutputRecord(Plain):
    """What was drawn. Seeds are decimal text, since they exceed exact JSON numbers.

    Attributes:
        n: How many images.
        sha256: Of each image's RGB bytes.
        seed: Of the one generator that all images of the call came from.
        seeds: One per image, where each had a generator of its own.
    """

    n: int
    sha256: tuple[str, ...]
    seed: str | None = None
    seeds: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ErrorRecord(Plain):
    """A failure: a stable `code`, the class of the exception; its `message` (may quote a prompt) with `text="full"`."""

    code: str
    type: str
    message: str | None = None


@dataclass(frozen=True, slots=True)
class SegmentRecord(Plain):
    """What a segment promises, and where it belongs.

    Attributes:
        text: Its text policy.
        durable: Whether each record was synced to disk.
        key_id: Of the key of its HMACs.
        writer: The log of one process, `<host>-<pid>-<uuid7>`; its segments are numbered from 1.
        number: Which of them this is.
        after: Hash of the last record of the segment before it.
        signer: Public key (Ed25519, 64 hex digits) that its digests are signed with; absent where nothing is signed.
    """

    text: str
    durable: bool
    key_id: str
    writer: str | None = None
    number: int | None = None
    after: str | None = None
    signer: str | None = None


@dataclass(frozen=True, slots=True)
class FooterRecord(Plain):
    """The end of a closed segment.

    Attributes:
        count: How many records stand before the footer.
        head: Hash of the last of them.
        next: Path, from the root of the log, of the segment that the writer went on with; absent at its end.
    """

    count: int
    head: str
    next: str | None = None


@dataclass(frozen=True, slots=True)
class GapRecord(Plain):
    """Records that could not be written and are lost (mode `observe` only): how many, and since when."""

    lost: int
    since: str


@dataclass(frozen=True, slots=True)
class Record(Plain):
    """One line of the log.

    Attributes:
        v: Schema version, 1.
        seq: Number within the segment, contiguous from 0.
        prev: Hash of the record before it.
        ts: Wall clock, UTC, milliseconds.
        event_id: A UUID of version 7.
        kind: One of `EventKind`, or `segment.open`, `segment.close`.
        timing_ms: Duration of what is recorded, in milliseconds.
        truncated_tokens: How many tokens of the prompt the model does not read, because they are past its window.
        hash: sha256 of the canonical form of this record without `hash`.
    """

    v: int
    seq: int
    prev: str
    ts: str
    event_id: str
    kind: str
    hash: str
    request: RequestRecord | None = None
    runtime: RuntimeRecord | None = None
    policy: PolicyRecord | None = None
    prompt: PromptRecord | None = None
    negative: PromptRecord | None = None
    inputs: tuple[str, ...] | None = None
    membranes: tuple[MembraneRecord, ...] | None = None
    hits: tuple[HitRecord, ...] | None = None
    exceptions: tuple[ExceptionRecord, ...] | None = None
    verdict: VerdictRecord | None = None
    action: ActionRecord | None = None
    attest: AttestRecord | None = None
    output: OutputRecord | None = None
    error: ErrorRecord | None = None
    segment: SegmentRecord | None = None
    footer: FooterRecord | None = None
    gap: GapRecord | None = None
    timing_ms: float | None = None
    truncated_tokens: int | None = None


class EventFields(TypedDict, total=False):
    """What the guard may pass to `AuditLog.write`; `REQUIRED` says which a kind needs."""

    request: RequestRecord
    policy: PolicyRecord
    prompt: PromptRecord
    negative: PromptRecord
    inputs: tuple[InputKind, ...]
    membranes: tuple[MembraneRecord, ...]
    hits: tuple[HitRecord, ...]
    exceptions: tuple[ExceptionRecord, ...]
    verdict: VerdictRecord
    action: ActionRecord
    attest: AttestRecord
    output: OutputRecord
    error: ErrorRecord
    gap: GapRecord
    timing_ms: float
    truncated_tokens: int


REQUIRED: dict[str, tuple[str, ...]] = {
    "segment.open": ("runtime", "segment"),
    "policy.applied": ("runtime", "policy", "membranes", "attest"),
    "policy.removed": ("runtime", "policy"),
    "gated": ("runtime", "request", "policy", "inputs", "membranes", "hits", "verdict", "action", "attest"),
    "generated": ("runtime", "request", "policy", "membranes", "attest", "output", "timing_ms"),
    "refused": ("runtime", "request", "policy", "membranes", "hits", "verdict", "action"),
    "run.failed": ("runtime", "request", "policy", "error"),
    "audit.gap": ("runtime", "policy", "gap"),
    "segment.close": ("runtime", "footer"),
}
