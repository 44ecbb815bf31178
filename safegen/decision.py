"""What a gatekeeper decides with and about: membranes in use, how far they open, and what follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from safegen.backend.base import Backend
from safegen.errors import FormatError
from safegen.membrane.weights import Membrane
from safegen.policy.fields import Action
from safegen.policy.hits import Hit
from safegen.policy.resolve import ResolvedRule
from safegen.transport import calibration
from safegen.transport.curve import Curve
from safegen.transport.evidence import Trigger
from safegen.transport.sentence import SentenceEncoder
from safegen.transport.transport import Reading, Score, Target

Outcome = Literal["allow", "flag", "erase", "refuse"]
GRAVITY: Mapping[Outcome, int] = {"allow": 0, "flag": 1, "erase": 2, "refuse": 3}


@dataclass(frozen=True, slots=True)
class Installed:
    """A membrane that a rule uses: the rule, the membrane, and the sha256 of its file."""

    rule: ResolvedRule
    membrane: Membrane
    sha256: str

    def curves(self, encoders: Mapping[str, str]) -> tuple[dict[str, Curve], tuple[str, ...]]:
        """Returns the curve of each graded score that the rule opens by, and the scores that are not calibrated.

        Args:
            encoders: Fingerprint of the encoder of each graded score.

        Raises:
            FormatError: The membrane's calibration cannot be read.
        """
        transport = self.rule.transport
        graded = [score for score in transport.score if score in calibration.GRADED]
        if transport.lo != "calibrated" and transport.hi != "calibrated":
            return dict.fromkeys(graded, Curve(transport.lo, transport.hi)), ()
        try:
            measured = calibration.parse(self.membrane.metadata)
        except FormatError as error:
            raise FormatError(f"membrane {self.membrane.concept!r}: {error}") from error
        found = {score: calibration.found(measured, score, encoders[score]) for score in graded}
        return {k: one.curve for k, one in found.items() if one}, tuple(k for k, one in found.items() if one is None)


@dataclass(frozen=True, slots=True)
class Activation:
    """How far one membrane opens for one row, and why.

    Attributes:
        installed: The membrane and its rule.
        target: What its gate looks for, with the thresholds that hold on this model.
        permeability: γ in [0, 1] after `on_unknown` and `guidance`; exactly 0 where it stays shut.
        triggers: The places in the prompt that did it: phrases, and with `audit.evidence` tokens.
    """

    installed: Installed
    target: Target
    permeability: float
    triggers: tuple[Trigger, ...] = ()
    _place: tuple[Reading, int, int] = field(kw_only=True, repr=False, compare=False)

    @property
    def score(self) -> Score:
        """The parts of the score."""
        reading, row, target = self._place
        return reading.score(row, target)

    @property
    def opened(self) -> bool:
        """Whether the membrane acts on this row."""
        return self.permeability > 0


@dataclass(frozen=True, slots=True)
class Excepted:
    """A rule that a prompt touches, and that acts more mildly for this caller: `action` by the exception of this id."""

    exception: str
    rule: str
    action: Action


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy decides for one row of conditioning.

    Attributes:
        text: The caller's text, or what the token ids decode to; None where the origin is unknown.
        decoded: Whether `text` was decoded from token ids because the caller's own text was not seen.
        activations: One per membrane, in rule order.
        hits: Rules whose concept the text names, whatever their action.
        outcome: The gravest of what follows: refuse > erase > flag > allow.
        rule: The rule that decided; None for `allow`.
        reason: One sentence for people.
        truncated: How many tokens of `text` the model does not read, because they are past its window.
        exceptions: The exceptions that made a difference: their rules are touched, and do less than they would.
    """

    text: str | None
    decoded: bool
    activations: tuple[Activation, ...]
    hits: tuple[Hit, ...]
    outcome: Outcome
    rule: ResolvedRule | None
    reason: str
    truncated: int = 0
    exceptions: tuple[Excepted, ...] = ()

    @property
    def verdict(self) -> Literal["match", "clear"]:
        """What was found, whatever is done about it: whether a rule is touched."""
        return "clear" if self.outcome == "allow" else "match"


def joined(decision: Decision, others: Sequence[Decision]) -> Decision:
    """Returns what follows for a row that holds further texts: the gravest, and of each membrane the largest.

    Args:
        decision: On the row's own text, which it goes on stating.
        others: On its further texts. Their places (triggers) are not kept, because they are places in another text.
    """
    every = (decision, *others)
    gravest = max(every, key=lambda one: GRAVITY[one.outcome])
    activations = tuple(
        own if own.permeability >= other.permeability else replace(other, triggers=())
        for own, other in (
            (own, max((one.activations[k] for one in every), key=lambda found: found.permeability))
            for k, own in enumerate(decision.activations)
        )
    )
    hits = tuple(dict.fromkeys(hit for one in every for hit in one.hits))
    exceptions = tuple(dict.fromkeys(one for decided in every for one in decided.exceptions))
    return replace(
        decision,
        activations=activations,
        hits=hits,
        exceptions=exceptions,
        outcome=gravest.outcome,
        rule=gravest.rule,
        reason=gravest.reason,
    )


class Encoders(Mapping[str, str]):
    """Fingerprints of the encoders by graded score, taken when they are needed: it takes a pass over the weights."""

    def __init__(self, backend: Backend, sentence: SentenceEncoder | None) -> None:
        self._backend = backend
        self._sentence = sentence

    def __getitem__(self, score: str) -> str:
        if score == "semantic":
            return self._sentence.fingerprint if self._sentence is not None else ""
        return self._backend.fingerprint

    def __iter__(self) -> Iterator[str]:
        return iter(calibration.GRADED)

    def __len__(self) -> int:
        return len(calibration.GRADED)


def target_of(item: Installed, curves: Mapping[str, Curve], missing: Sequence[str]) -> Target:
    """Returns what a membrane's gate looks for; a score that is not calibrated here is replaced by the words."""
    transport = item.rule.transport
    least = 1.0 if "always" in transport.score else transport.least
    return Target(item.membrane.targets, curves, lexical="lexical" in transport.score or bool(missing), least=least)


def uncalibrated(
    policy: str, installed: Sequence[Installed], missing: Sequence[Sequence[str]], encoders: Mapping[str, str]
) -> tuple[str, ...]:
    """Returns a notice for each score that membranes should open by and are not calibrated for."""
    notices: list[str] = []
    for score in calibration.GRADED:
        concepts = [item.rule.concept.id for item, scores in zip(installed, missing, strict=True) if score in scores]
        if concepts:
            shown = ", ".join(concepts[:5]) + (", …" if len(concepts) > 5 else "")
            notices.append(
                f"{policy}: not calibrated for the score {score} on this encoder ({encoders[score][:19]}…): {shown} "
                f"({len(concepts)} of {len(installed)} membranes). In its place these open fully for prompts that name "
                "their concept and for conditioning of unknown origin; run `safegen calibrate` on their files."
            )
    return tuple(notices)


def verdict_of(
    rules: Mapping[str, ResolvedRule], seen: Sequence[str], hits: Sequence[Hit]
) -> tuple[Outcome, ResolvedRule | None, str]:
    """Returns the gravest of what follows from the rules whose gates open and those that are named."""
    found: list[tuple[Outcome, ResolvedRule, str]] = []
    for hit in hits:
        rule = rules[hit.rule]
        if rule.effective != "erase":
            missing = rule.effective == "refuse" and not rule.has_membrane and rule.action != "refuse"
            why = ", for which no membrane is installed" if missing else under(rule)
            found.append((rule.effective, rule, f"the prompt names {rule.concept.name!r} ({hit.phrase!r}){why}"))
    for name in seen:
        rule = rules.get(name)
        if rule is not None and rule.effective == "flag":
            found.append(("flag", rule, f"the membrane of {rule.concept.name!r} would open{under(rule)}"))
        elif rule is not None:
            found.append(("erase", rule, f"the membrane of {rule.concept.name!r} opens{under(rule)}"))
    if not found:
        return "allow", None, "no rule is touched"
    return max(found, key=lambda entry: (GRAVITY[entry[0]], entry[1].severity))


def excepted(rules: Mapping[str, ResolvedRule], touched: Sequence[str]) -> tuple[Excepted, ...]:
    """Returns the exceptions under which touched rules stand, in the order in which the rules are touched."""
    found = [rules[name] for name in dict.fromkeys(touched) if name in rules]
    return tuple(Excepted(rule.exception, rule.id, rule.effective) for rule in found if rule.exception is not None)


def under(rule: ResolvedRule) -> str:
    """Returns what a sentence about a rule says of the exception that it stands under; nothing without one."""
    return f", under exception {rule.exception!r}" if rule.exception is not None else ""
