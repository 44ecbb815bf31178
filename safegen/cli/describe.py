"""What a policy decides for a prompt, as plain values: JSON and tables are both made from these."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from safegen.cli.render import Column, Line

if TYPE_CHECKING:
    from safegen.gatekeeper import Activation, Decision
    from safegen.policy.resolve import ResolvedPolicy

_DIGITS = 6  # as in the audit log


class HitValues(TypedDict):
    """A rule whose concept the prompt names."""

    rule: str
    concept: str
    phrase: str


class MembraneValues(TypedDict):
    """How far one membrane opens for one prompt, and why."""

    rule: str
    concept: str
    opened: bool
    permeability: float
    floor: float
    clipcos: float
    token: float | None
    lexical: float | None
    words: list[str]


class DecisionValues(TypedDict):
    """What the policy decides for one prompt; `fired` lists every rule that the prompt touches."""

    outcome: str
    rule: str | None
    severity: str | None
    reason: str
    fired: list[str]
    hits: list[HitValues]
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


def decision_values(decision: Decision) -> DecisionValues:
    """Returns a decision as plain values, numbers rounded to six digits."""
    fired = [hit.rule for hit in decision.hits]
    fired += [activation.installed.rule.id for activation in decision.activations if activation.opened]
    return {
        "outcome": decision.outcome,
        "rule": decision.rule.id if decision.rule else None,
        "severity": decision.rule.severity.value if decision.rule else None,
        "reason": decision.reason,
        "fired": list(dict.fromkeys(fired)),
        "hits": [{"rule": hit.rule, "concept": hit.concept, "phrase": hit.phrase} for hit in decision.hits],
        "membranes": [_membrane_values(activation) for activation in decision.activations],
    }


def _membrane_values(activation: Activation) -> MembraneValues:
    score = activation.score
    return {
        "rule": activation.installed.rule.id,
        "concept": activation.installed.rule.concept.id,
        "opened": activation.opened,
        "permeability": round(activation.permeability, _DIGITS),
        "floor": round(activation.installed.floor, _DIGITS),
        "clipcos": round(score.clipcos, _DIGITS),
        "token": None if score.token is None else round(score.token, _DIGITS),
        "lexical": None if score.lexical is None else round(score.lexical, _DIGITS),
        "words": list(score.words),
    }


SCORE_COLUMNS = (Column("γ", width=5), Column("clipcos", width=7), Column("token", width=5), Column("lexical", width=7))
DECISION_COLUMNS = (
    Column("line", width=6),
    Column("prompt", share=3),
    Column("outcome", width=7),
    Column("rule", share=2),
    Column("membrane", share=2),
    *SCORE_COLUMNS,
    Column("words", share=2),
)


def score_cells(membrane: MembraneValues | None) -> tuple[str, ...]:
    """Returns the cells of `SCORE_COLUMNS`; dashes where no membrane is concerned."""
    if membrane is None:
        return ("-",) * len(SCORE_COLUMNS)
    parts = (membrane["permeability"], membrane["clipcos"], membrane["token"], membrane["lexical"])
    return tuple("-" if value is None else f"{value:.3f}" for value in parts)


def nearest(decision: DecisionValues) -> MembraneValues | None:
    """Returns the membrane that a prompt comes closest to opening; None where the policy has none."""

    def score(membrane: MembraneValues) -> float:
        return max(membrane["clipcos"], membrane["token"] or 0.0, membrane["lexical"] or 0.0)

    return max(decision["membranes"], key=score, default=None)


def decision_lines(number: int, prompt: str, decision: DecisionValues) -> list[Line]:
    """Returns the lines of a prompt under `DECISION_COLUMNS`: one for each rule that it touches, one if none."""
    opened = {membrane["rule"]: membrane for membrane in decision["membranes"] if membrane["opened"]}
    if not decision["fired"]:
        cells = (str(number), prompt, decision["outcome"], "-", "-", *score_cells(None), "")
        return [Line(cells, dim=True)]
    lines: list[Line] = []
    for rule in decision["fired"]:
        membrane = opened.get(rule)
        words = membrane["words"] if membrane else [hit["phrase"] for hit in decision["hits"] if hit["rule"] == rule]
        lead = (str(number), prompt, decision["outcome"]) if not lines else ("", "", "")
        concept = membrane["concept"] if membrane else "-"
        lines.append(
            Line(
                (*lead, rule, concept, *score_cells(membrane), ", ".join(words)), bright=decision["outcome"] == "refuse"
            )
        )
    return lines
