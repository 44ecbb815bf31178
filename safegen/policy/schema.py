"""The policy document as frozen models; every key has one meaning and unknown keys are faults.

The models say what a policy may contain. What it comes to on a given base model is `safegen.policy.resolve`; reading
it from a file, with positions in every message, is `safegen.policy.load`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import total_ordering
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from safegen.policy.document import Loc
from safegen.policy.faults import CONSISTENCY

Mode = Literal["enforce", "observe", "disabled"]
Category = Literal["explicit", "artist-style", "ip-character", "object", "memorised", "custom"]
Action = Literal["erase", "refuse", "flag"]
OnUnknown = Literal["open", "refuse"]
OnMissing = Literal["refuse-prompts", "error", "flag"]
ScoreName = Literal["direction", "lexical", "paper", "semantic", "always"]
Guidance = Literal["both", "conditional"]


def spelled(pattern: str, words: str) -> AfterValidator:
    """Returns a validator of text that matches `pattern` in full; `words` say it in the message."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise PydanticCustomError("spelling", "expected {words}", {"words": words})
        return value

    return AfterValidator(check)


Kebab = Annotated[str, spelled(r"[a-z0-9]+(-[a-z0-9]+)*", "kebab case (like artist-styles)")]
_ConceptName = Annotated[
    str, spelled(r"[a-z0-9]+(-[a-z0-9]+)*(/\*)?", "a concept id (like van-gogh) or a category (like artist-style/*)")
]
_Version = Annotated[str, spelled(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", "a semantic version (like 1.0.0)")]

_Threshold = Annotated[float, Field(strict=True, ge=-1, le=1)] | Literal["calibrated"]

_SWITCHES = {"on": "enforce", "yes": "enforce", "true": "enforce"} | dict.fromkeys(("off", "no", "false"), "disabled")


class Strict(BaseModel):
    """Base of all document models: frozen, and unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@total_ordering
class Severity(Enum):
    """How bad it would be if the concept got through; ordered, so exit codes can ask for `>= HIGH`."""

    INFO = "info"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    def __lt__(self, other: object) -> bool:
        """Compares by rank: info < low < medium < high < critical."""
        if not isinstance(other, Severity):
            return NotImplemented
        ranks = list(Severity)
        return ranks.index(self) < ranks.index(other)


class Metadata(Strict):
    """Which policy this is, for people and for the audit log.

    Attributes:
        id: Kebab case, stable across versions.
        version: Semantic version.
        description: What the policy is for.
        owner: Whom to ask.
    """

    id: Kebab
    version: _Version
    description: str = ""
    owner: str = ""


class Transport(Strict):
    """How a prompt becomes a permeability.

    Attributes:
        score: One or more of `direction` (what the prompt changes in the text encoding, compared with the concept),
            `lexical` (a whole phrase of the concept in the text), `paper` (the larger of CLIP cosine and token overlap:
            SPM, Eq. 10-11), `semantic` (cosine of sentence encodings) and `always`; the one that opens furthest counts.
        lo: Score from which a membrane starts to open, in [-1, 1]; below it, it is exactly shut. `calibrated` takes
            what the membrane file says for the pipeline's text encoder. `lexical` and `always` are 0 or 1.
        hi: Score from which it is fully open, at least `lo`; between the two it opens in proportion.
        least: Permeability for every prompt, whatever its scores, in [0, 1].
        guidance: `conditional` opens the rows of the prompts; `both` opens the unconditional (or negative) row of each
            prompt as far as the prompt's own, as SPM's released code does.
    """

    score: Annotated[tuple[ScoreName, ...], Field(min_length=1)] = ("direction", "lexical")
    lo: _Threshold = "calibrated"
    hi: _Threshold = "calibrated"
    least: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    guidance: Guidance = "conditional"

    @field_validator("score", mode="before")
    @classmethod
    def _check_score(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("lo", "hi", mode="before")
    @classmethod
    def _check_threshold(cls, value: object) -> object:
        # Checked before the union, which would report one fault per alternative.
        if _is_threshold(value) or value == "calibrated":
            return value
        raise PydanticCustomError("threshold", "expected a number from -1 to 1, or calibrated")


class Defaults(Strict):
    """What holds where a rule says nothing else.

    Attributes:
        on_unknown: Conditioning of unknown origin (foreign embeddings): `open` opens all membranes fully.
        on_missing: A rule erases a concept that has no membrane for the base family: refuse the prompts that name it,
            fail to apply the policy, or only record them.
        transport: Scores to permeabilities.
        sentence_encoder: What the score `semantic` reads with: a model folder, or a hub id with its commit.
    """

    on_unknown: OnUnknown = "open"
    on_missing: OnMissing = "refuse-prompts"
    transport: Transport = Transport()
    sentence_encoder: str | None = None


class Rule(Strict):
    """One thing that must not appear.

    Attributes:
        id: Kebab case; logs, tests and reports refer to it.
        concept: Concept id of the catalogue, or `<category>/*` for every world concept of that category.
        category: The concept's category, or `custom` for a grouping of one's own.
        severity: Used by reports and exit codes, not by the arithmetic.
        action: `erase` opens the membrane as far as the prompt asks; `refuse` draws nothing; `flag` only records.
        strength: Factor on the membrane, above 0 and at most 4; 1 is as trained.
        transport: Overrides single keys of `defaults.transport`.
        on_missing: Overrides `defaults.on_missing`.
        description: For people.
    """

    id: Kebab
    concept: _ConceptName
    category: Category
    severity: Severity = Severity.HIGH
    action: Action = "erase"
    strength: Annotated[float, Field(strict=True, gt=0, le=4)] = 1.0
    transport: Transport | None = None
    on_missing: OnMissing | None = None
    description: str = ""


class Audit(Strict):
    """The record.

    Attributes:
        text: Whether prompts are written to the log: not at all, what the host's redactor leaves of them, or in full.
        on_failure: A record cannot be written: refuse the run, or go on degraded (not in mode enforce).
        evidence: Whether the record of a prompt that opens a membrane says which of its tokens did it, as positions;
            it takes one more pass of the text encoder for each token of such a prompt.
    """

    text: Literal["none", "redacted", "full"] = "none"
    on_failure: Literal["refuse", "degrade"] = "refuse"
    evidence: Literal["none", "opened"] = "none"


class Policy(Strict):
    """A whole policy document.

    Attributes:
        apiVersion: Version of this schema.
        kind: Always `Policy`.
        metadata: Which policy this is.
        mode: `enforce` acts; `observe` records what it would do; `disabled` does nothing.
        defaults: What holds where a rule says nothing else.
        rules: At least one; ids are unique, and no two rules name the same concept.
        audit: The record.
    """

    apiVersion: Literal["safegen.dev/v1"]  # noqa: N815 - the document's own spelling, as in Kubernetes
    kind: Literal["Policy"]
    metadata: Metadata
    mode: Mode = "enforce"
    defaults: Defaults = Defaults()
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    audit: Audit = Audit()

    @field_validator("mode", mode="before")
    @classmethod
    def _check_switch(cls, value: object) -> object:
        meant = _SWITCHES.get(str(value).lower())
        if meant is None:
            return value
        raise PydanticCustomError(
            "switch",
            "expected enforce, observe or disabled, never a switch, which YAML 1.1 tools read as true or false; "
            "write `mode: {meant}`",
            {"meant": meant},
        )

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        faults = consistency_faults(self.model_dump(mode="json", exclude_unset=True))
        if faults:
            raise PydanticCustomError(CONSISTENCY, "{text}", {"text": "; ".join(text for _, text in faults)})
        return self


def consistency_faults(document: Mapping[str, Any]) -> list[tuple[Loc, str]]:
    """Returns the faults between fields of a policy document, as paths and messages.

    Args:
        document: The document as plain values; parts with other faults are passed over.

    Returns:
        Duplicate rule ids, concepts named by two rules, thresholds that do not go together, a score without its
        encoder, and a degradable audit in mode enforce.
    """
    faults: list[tuple[Loc, str]] = [*_transport_faults(document)]
    rules: Any = document.get("rules")
    for key, message in (("id", "rule id {!r} is taken by rule {}"), ("concept", "concept {!r} has rule {} already")):
        seen: dict[str, int] = {}
        for index, rule in enumerate(cast("list[Any]", rules) if isinstance(rules, list) else []):
            name: Any = cast("dict[str, Any]", rule).get(key) if isinstance(rule, dict) else None
            if not isinstance(name, str):
                continue
            if name in seen:
                faults.append((("rules", index, key), message.format(name, seen[name] + 1)))
            seen.setdefault(name, index)
    audit: Any = document.get("audit")
    if isinstance(audit, dict) and document.get("mode", "enforce") == "enforce":
        audit = cast("dict[str, Any]", audit)
        if audit.get("on_failure") == "degrade":
            text = "degrade does not go with mode enforce: what is not recorded must not be drawn; use refuse"
            faults.append((("audit", "on_failure"), text))
    return faults


def _transport_faults(document: Mapping[str, Any]) -> Iterator[tuple[Loc, str]]:
    """Yields the faults of `defaults.transport`, and of each rule's once the defaults are filled in."""
    defaults = _mapping(document, "defaults")
    common = _mapping(defaults, "transport")
    rules: Any = document.get("rules")
    own = [
        (("rules", index, "transport"), _mapping(cast("dict[str, Any]", rule), "transport"))
        for index, rule in enumerate(cast("list[Any]", rules) if isinstance(rules, list) else [])
        if isinstance(rule, dict)
    ]
    places: list[tuple[Loc, dict[str, Any]]] = [(("defaults", "transport"), common), *own]
    for place, given in places:
        if not given:
            continue
        chosen = common | given
        lo, hi = chosen.get("lo", "calibrated"), chosen.get("hi", "calibrated")
        numbers = [_is_threshold(value) for value in (lo, hi)]
        if any(numbers) and "calibrated" in (lo, hi):
            yield place, f"lo is {lo} and hi is {hi}: expected two numbers, or calibrated for both"
        elif all(numbers) and lo > hi:
            yield place, f"lo is {lo}, above hi, which is {hi}; expected lo not above hi"
        score = chosen.get("score")
        if isinstance(score, str | list | tuple) and "semantic" in score and not defaults.get("sentence_encoder"):
            yield (
                place,
                "the score semantic needs defaults.sentence_encoder: a model folder, or a hub id with its commit",
            )


def _is_threshold(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= 1


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    found: Any = document.get(key)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
