"""What a policy decides for a prompt, as plain values: JSON and tables are both made from these."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from safegen.cli.render import Column, Line

if TYPE_CHECKING:
    from safegen.decision import Activation, Decision
    from safegen.policy.resolve import ResolvedPolicy
    from safegen.transport.evidence import Trigger

_DIGITS = 6  # as in the audit log


class HitValues(TypedDict):
    """A rule whose concept the prompt names; `action` is what it does to such prompts on this base model."""

    rule: str
    concept: str
    phrase: str
    action: str


class ExceptionValues(TypedDict):
    """An exception of the policy that made a difference: what the rule does instead, for this caller."""

    exception: str
    rule: str
    action: str


class ActionValues(TypedDict):
    """What is done: `type`, whether that is enforced; where it is not, what `enforce` would do (`would`)."""

    type: str
    enforced: bool
    would: str | None


class TriggerValues(TypedDict):
    """A place in the prompt that opens a membrane; offsets in code points."""

    start: int
    end: int
    text: str
    by: str
    weight: float
    normalised: list[str]


class ThresholdValues(TypedDict):
    """The thresholds of a score: shut below `lo`, fully open from `hi` on."""

    lo: float
    hi: float


class MembraneValues(TypedDict):
    """How far one membrane opens for one prompt, and why.

    `action` is "erase" where it opens and "allow" where it stays shut. `words` did it; where none did, `similar_to` is
    the concept that the prompt's encoding as a whole comes close to.
    """

    rule: str
    concept: str
    action: str
    opened: bool
    permeability: float
    strength: float
    direction: float | None
    lexical: float | None
    clipcos: float | None
    token: float | None
    semantic: float | None
    thresholds: dict[str, ThresholdValues]
    least: float
    words: list[str]
    similar_to: str | None
    triggers: list[TriggerValues]


class DecisionValues(TypedDict):
    """What the policy decides for one prompt; `fired` lists every rule that the prompt touches.

    `verdict` is what was found, `outcome` what follows from it, `action` what is done in the policy's mode.
    """

    verdict: str
    outcome: str
    action: ActionValues
    rule: str | None
    severity: str | None
    reason: str
    fired: list[str]
    hits: list[HitValues]
    exceptions: list[ExceptionValues]
    truncated_tokens: int
    membranes: list[MembraneValues]


class PolicyValues(TypedDict):
    """Which policy decided."""

    id: str
    version: str
    digest: str
    mode: str


def policy_values(policy: ResolvedPolicy) -> PolicyValues:
    """Returns id, version, digest and mode of a policy."""
    return {"id": policy.id, "version": policy.version, "digest": f"sha256:{policy.digest}", "mode": policy.mode}


def decision_values(decision: Decision, policy: ResolvedPolicy) -> DecisionValues:
    """Returns a decision under `policy` as plain values, numbers rounded to six digits."""
    actions: dict[str, str] = {rule.id: rule.effective for rule in policy.every_rule} if decision.hits else {}
    actions |= {one.rule: one.action for one in decision.exceptions}
    fired = [hit.rule for hit in decision.hits] + [one.rule for one in decision.exceptions]
    fired += [activation.installed.rule.id for activation in decision.activations if activation.opened]
    enforced = policy.mode == "enforce"
    return {
        "verdict": decision.verdict,
        "outcome": decision.outcome,
        "action": {
            "type": decision.outcome if enforced else "allow",
            "enforced": enforced,
            "would": None if enforced else decision.outcome,
        },
        "rule": decision.rule.id if decision.rule else None,
        "severity": decision.rule.severity.value if decision.rule else None,
        "reason": decision.reason,
        "fired": list(dict.fromkeys(fired)),
        "hits": [
            {"rule": hit.rule, "concept": hit.concept, "phrase": hit.phrase, "action": actions[hit.rule]}
            for hit in decision.hits
        ],
        "exceptions": [
            {"exception": one.exception, "rule": one.rule, "action": one.action} for one in decision.exceptions
        ],
        "truncated_tokens": decision.truncated,
        "membranes": [membrane_values(activation, decision.text or "") for activation in decision.activations],
    }


def membrane_values(activation: Activation, text: str) -> MembraneValues:
    """Returns how far a membrane opens for a prompt with this text, and why."""
    score, target = activation.score, activation.target
    concept = activation.installed.rule.concept
    return {
        "rule": activation.installed.rule.id,
        "concept": concept.id,
        "action": "erase" if activation.opened else "allow",
        "opened": activation.opened,
        "permeability": round(activation.permeability, _DIGITS),
        "strength": activation.installed.rule.strength,
        "direction": score.direction,
        "lexical": score.lexical,
        "clipcos": score.clipcos,
        "token": score.token,
        "semantic": score.semantic,
        "thresholds": {name: {"lo": curve.lo, "hi": curve.hi} for name, curve in target.curves.items()},
        "least": target.least,
        "words": list(score.words),
        "similar_to": concept.name if activation.opened and not score.words else None,
        "triggers": [trigger_values(trigger, text) for trigger in activation.triggers],
    }


def trigger_values(trigger: Trigger, text: str) -> TriggerValues:
    """Returns a place in a prompt as plain values."""
    return {
        "start": trigger.start,
        "end": trigger.end,
        "text": text[trigger.start : trigger.end],
        "by": trigger.by,
        "weight": round(trigger.weight, _DIGITS),
        "normalised": list(trigger.changes),
    }


SCORE_COLUMNS = (Column("γ", width=5), Column("score", width=6), Column("lo", width=6), Column("lexical", width=7))
DECISION_COLUMNS = (
    Column("line", width=6),
    Column("prompt", share=3),
    Column("action", width=6),
    Column("rule", share=2),
    Column("membrane", share=2),
    *SCORE_COLUMNS,
    Column("trigger words", share=3),
)


def score_cells(membrane: MembraneValues | None) -> tuple[str, ...]:
    """Returns the cells of `SCORE_COLUMNS`; dashes where no membrane is concerned."""
    if membrane is None:
        return ("-",) * len(SCORE_COLUMNS)
    held = {name: value for name, value in graded(membrane).items() if name in membrane["thresholds"]}
    name, value = next(iter(held.items()), ("", None))
    lo = membrane["thresholds"][name]["lo"] if name else None
    parts = (membrane["permeability"], value, lo, membrane["lexical"])
    return tuple("-" if value is None else f"{value:.3f}" for value in parts)


def graded(membrane: MembraneValues) -> dict[str, float | None]:
    """Returns the graded scores by name, that of the paper as the larger of its parts; None where not computed."""
    parts = [part for part in (membrane["clipcos"], membrane["token"]) if part is not None]
    return {
        "direction": membrane["direction"],
        "paper": max(parts) if parts else None,
        "semantic": membrane["semantic"],
    }


def nearest(decision: DecisionValues) -> MembraneValues | None:
    """Returns the membrane that a prompt comes closest to opening; None where the policy has none."""

    def closeness(membrane: MembraneValues) -> tuple[float, float]:
        held = {name: (value, membrane["thresholds"].get(name)) for name, value in graded(membrane).items()}
        short = [value - t["lo"] for value, t in held.values() if value is not None and t is not None]
        return membrane["permeability"], max(short, default=-2.0)

    return max(decision["membranes"], key=closeness, default=None)


def because(membrane: MembraneValues) -> str:
    """Returns what opened a membrane, for people: the words, or else what the whole prompt is similar to."""
    if membrane["words"]:
        return ", ".join(membrane["words"])
    return f"similar to {membrane['similar_to']!r}" if membrane["similar_to"] else ""


def decision_lines(number: int, prompt: str, decision: DecisionValues, *, shut: bool = False) -> list[Line]:
    """Returns the lines of a prompt under `DECISION_COLUMNS`: one for each membrane that opens and each rule it names.

    Args:
        number: Line of the prompt in its file.
        prompt: The prompt.
        decision: What was decided.
        shut: Whether membranes that stay shut get a line too; a prompt has at least one line then.
    """
    refused = decision["outcome"] == "refuse"
    rows: list[tuple[tuple[str, ...], bool]] = []
    for membrane in decision["membranes"]:
        if membrane["opened"] or shut:
            cells = (membrane["action"], membrane["rule"], membrane["concept"])
            rows.append(((*cells, *score_cells(membrane), because(membrane)), not membrane["opened"]))
    acting = {membrane["rule"] for membrane in decision["membranes"] if membrane["opened"]}
    phrases: dict[tuple[str, str], list[str]] = {}
    for hit in decision["hits"]:
        if hit["rule"] not in acting:
            phrases.setdefault((hit["action"], hit["rule"]), []).append(hit["phrase"])
    for key, found in phrases.items():
        rows.append(((*key, "-", *score_cells(None), ", ".join(found)), False))
    if not rows and shut:
        rows.append(((decision["outcome"], "-", "-", *score_cells(None), ""), True))
    leads = [(str(number), prompt), *[("", "")] * len(rows)]
    return [
        Line((*lead, *cells), bright=refused and not dim, dim=dim)
        for lead, (cells, dim) in zip(leads, rows, strict=False)
    ]
