"""What a policy decides for a prompt, as plain values: JSON and tables are both made from these."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from safegen.cli.render import Column, Line

if TYPE_CHECKING:
    from safegen.gatekeeper import Activation, Decision
    from safegen.policy.resolve import ResolvedPolicy

_DIGITS = 6  # as in the audit log


class HitValues(TypedDict):
    """A rule whose concept the prompt names; `action` is what it does to such prompts on this base model."""

    rule: str
    concept: str
    phrase: str
    action: str


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
    floor: float
    clipcos: float
    token: float | None
    lexical: float | None
    words: list[str]
    similar_to: str | None


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


def decision_values(decision: Decision, policy: ResolvedPolicy) -> DecisionValues:
    """Returns a decision under `policy` as plain values, numbers rounded to six digits."""
    actions = {rule.id: rule.effective for rule in policy.rules} if decision.hits else {}
    fired = [hit.rule for hit in decision.hits]
    fired += [activation.installed.rule.id for activation in decision.activations if activation.opened]
    return {
        "outcome": decision.outcome,
        "rule": decision.rule.id if decision.rule else None,
        "severity": decision.rule.severity.value if decision.rule else None,
        "reason": decision.reason,
        "fired": list(dict.fromkeys(fired)),
        "hits": [
            {"rule": hit.rule, "concept": hit.concept, "phrase": hit.phrase, "action": actions[hit.rule]}
            for hit in decision.hits
        ],
        "membranes": [_membrane_values(activation) for activation in decision.activations],
    }


def _membrane_values(activation: Activation) -> MembraneValues:
    score = activation.score
    concept = activation.installed.rule.concept
    return {
        "rule": activation.installed.rule.id,
        "concept": concept.id,
        "action": "erase" if activation.opened else "allow",
        "opened": activation.opened,
        "permeability": round(activation.permeability, _DIGITS),
        "floor": round(activation.installed.floor, _DIGITS),
        "clipcos": round(score.clipcos, _DIGITS),
        "token": None if score.token is None else round(score.token, _DIGITS),
        "lexical": None if score.lexical is None else round(score.lexical, _DIGITS),
        "words": list(score.words),
        "similar_to": concept.name if activation.opened and not score.words else None,
    }


SCORE_COLUMNS = (Column("γ", width=5), Column("clipcos", width=7), Column("token", width=5), Column("lexical", width=7))
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
    parts = (membrane["permeability"], membrane["clipcos"], membrane["token"], membrane["lexical"])
    return tuple("-" if value is None else f"{value:.3f}" for value in parts)


def nearest(decision: DecisionValues) -> MembraneValues | None:
    """Returns the membrane that a prompt comes closest to opening; None where the policy has none."""

    def score(membrane: MembraneValues) -> float:
        return max(membrane["clipcos"], membrane["token"] or 0.0, membrane["lexical"] or 0.0)

    return max(decision["membranes"], key=score, default=None)


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
