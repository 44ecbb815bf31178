"""The policy document as frozen models; every key has one meaning and unknown keys are faults.

The models say what a policy may contain. Faults between fields are in `safegen.policy.consistency`; what a policy comes
to on a given base model is `safegen.policy.resolve`; reading it from a file, with positions in every message, is
`safegen.policy.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr, StrictBool, field_validator, model_validator
from pydantic_core import PydanticCustomError

from safegen.policy.consistency import consistency_faults, is_threshold
from safegen.policy.document import Loc, Place
from safegen.policy.extend import MAX_PARENTS
from safegen.policy.faults import CONSISTENCY
from safegen.policy.fields import (
    TASKS,
    Action,
    Category,
    ConceptName,
    ContextKey,
    Day,
    Guidance,
    Kebab,
    Listed,
    Mode,
    OneOrMore,
    OnMissing,
    OnUnknown,
    RuleName,
    ScoreName,
    Severity,
    Strict,
    Task,
    Version,
    Words,
)

_Threshold = Annotated[float, Field(strict=True, ge=-1, le=1)] | Literal["calibrated"]

_SWITCHES = {"on": "enforce", "yes": "enforce", "true": "enforce"} | dict.fromkeys(("off", "no", "false"), "disabled")

BUILT_IN = "built-in default"


class Metadata(Strict):
    """Which policy this is, for people and for the audit log.

    Attributes:
        id: Kebab case, stable across versions.
        version: Semantic version.
        description: What the policy is for.
        owner: Whom to ask.
    """

    id: Kebab
    version: Version
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
        least: The floor: permeability for every prompt, whatever its scores, in [0, 1].
        guidance: `conditional` opens the rows of the prompts; `both` opens the unconditional (or negative) row of each
            prompt as far as the prompt's own, as SPM's released code does.
    """

    score: OneOrMore[ScoreName] = ("direction", "lexical")
    lo: _Threshold = "calibrated"
    hi: _Threshold = "calibrated"
    least: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    guidance: Guidance = "conditional"

    @field_validator("lo", "hi", mode="before")
    @classmethod
    def _check_threshold(cls, value: object) -> object:
        # Checked before the union, which would report one fault per alternative.
        if is_threshold(value) or value == "calibrated":
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
        id: Kebab case; logs, tests, exceptions and reports refer to it.
        concept: Concept id of the catalogue, or `<category>/*` for every world concept of that category.
        category: The concept's category or one above it (`explicit` for `explicit/nudity`), or `custom` for a grouping
            of one's own.
        severity: Used by reports and exit codes, not by the arithmetic.
        action: `erase` opens the membrane as far as the prompt asks; `refuse` draws nothing for prompts that name the
            concept, and erases where its membrane is installed and only the score sees it; `flag` only records.
        strength: Factor on the membrane, above 0 and at most 4; 1 is as trained.
        transport: Overrides single keys of `defaults.transport`.
        on_missing: Overrides `defaults.on_missing`.
        applies_to: The tasks that the rule holds for; a run whose task the caller does not state is held to all rules.
        description: For people.
        override: Whether the rule may be looser than what it inherits.
        reason: Why it is; required with `override: true`.
    """

    id: Kebab
    concept: ConceptName
    category: Category
    severity: Severity = Severity.HIGH
    action: Action = "erase"
    strength: Annotated[float, Field(strict=True, gt=0, le=4)] = 1.0
    transport: Transport | None = None
    on_missing: OnMissing | None = None
    applies_to: OneOrMore[Task] = TASKS
    description: str = ""
    override: StrictBool = False
    reason: str = ""


class PolicyException(Strict):
    """For some callers, until some day, some rules act more mildly. What is excepted is still found and recorded.

    Attributes:
        id: Kebab case; audit records refer to it.
        rules: Ids of the rules it is an exception from; `<rule id>/<concept id>` for one concept of a category.
        when: What the caller's context must say, such as a tenant and a route: all keys, each with one of its values.
        action: What happens instead, milder than what the rule asks for: `erase` or `flag`.
        reason: Why; a ticket, for instance.
        owner: Who answers for it.
        expires: The last day on which it holds, in UTC.
        override: Whether a policy may make this exception from a rule that it inherits.
    """

    id: Kebab
    rules: OneOrMore[RuleName]
    when: Annotated[Mapping[ContextKey, OneOrMore[Words]], Field(min_length=1)]
    action: Literal["erase", "flag"]
    reason: Words
    owner: Words
    expires: Day
    override: StrictBool = False


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
    """A whole policy document, with what it extends filled in.

    Attributes:
        apiVersion: Version of this schema.
        kind: Always `Policy`.
        metadata: Which policy this is.
        extends: Policies whose rules and settings hold here too, left to right: `builtin://strict`, the name of a
            shipped policy, or a path relative to this file. What is stated here may only be stricter.
        override: Whether mode, defaults and audit may be looser than what is inherited; rules say it for themselves.
        reason: Why they are; required with `override: true`.
        mode: `enforce` acts; `observe` records what it would do; `disabled` does nothing.
        defaults: What holds where a rule says nothing else.
        rules: At least one, here or inherited; ids are unique, and no two rules name the same concept.
        exceptions: For whom, and until when, rules act more mildly.
        audit: The record.
    """

    apiVersion: Literal["safegen.dev/v1"]  # noqa: N815 - the document's own spelling, as in Kubernetes
    kind: Literal["Policy"]
    metadata: Metadata
    extends: Annotated[Listed[Words], Field(max_length=MAX_PARENTS)] = ()
    override: StrictBool = False
    reason: str = ""
    mode: Mode = "enforce"
    defaults: Defaults = Defaults()
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)] = ()
    exceptions: tuple[PolicyException, ...] = ()
    audit: Audit = Audit()

    _places: Mapping[Loc, Place] = PrivateAttr(default_factory=dict[Loc, Place])
    _overrides: tuple[str, ...] = PrivateAttr(default=())

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

    @property
    def overrides(self) -> tuple[str, ...]:
        """Where this policy, or one that it extends, is looser than its parent, and why: one sentence each."""
        return self._overrides

    def where(self, loc: Loc) -> str:
        """Returns `file:line` of the value at a path, or `BUILT_IN` where no file states it."""
        place = self._places.get(loc)
        return f"{place.source}:{place.line}" if place is not None else BUILT_IN

    def read_from(self, places: Mapping[Loc, Place], overrides: tuple[str, ...]) -> Self:
        """Returns this policy, knowing where its values stand and what it overrides."""
        self._places, self._overrides = places, overrides
        return self
