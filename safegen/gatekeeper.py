"""What the policy decides for rows of conditioning: the one place that the runtime and the prompt audit share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safegen.backend.base import Backend
from safegen.backend.conditioning import Origin
from safegen.membrane.weights import Membrane
from safegen.policy.resolve import Hit, ResolvedPolicy, ResolvedRule, lexical_hits
from safegen.transport.transport import Gate, Score, Target

Outcome = Literal["allow", "flag", "erase", "refuse"]
_GRAVITY: dict[Outcome, int] = {"allow": 0, "flag": 1, "erase": 2, "refuse": 3}


@dataclass(frozen=True, slots=True)
class Installed:
    """A membrane that a rule uses: the rule, the membrane, and the sha256 of its file."""

    rule: ResolvedRule
    membrane: Membrane
    sha256: str

    @property
    def floor(self) -> float:
        """Score below which it stays exactly shut: the policy's number, or the membrane's own calibration."""
        floor = self.rule.transport.floor
        return self.membrane.floor if floor == "calibrated" else floor


@dataclass(frozen=True, slots=True)
class Activation:
    """How far one membrane opens for one row, and why.

    Attributes:
        installed: The membrane and its rule.
        score: The parts of the score.
        permeability: γ in [0, 1] after `on_unknown`; exactly 0 where it stays shut.
    """

    installed: Installed
    score: Score
    permeability: float

    @property
    def opened(self) -> bool:
        """Whether the membrane acts on this row."""
        return self.permeability > 0


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
    """

    text: str | None
    decoded: bool
    activations: tuple[Activation, ...]
    hits: tuple[Hit, ...]
    outcome: Outcome
    rule: ResolvedRule | None
    reason: str


class Gatekeeper:
    """Decides, for one host and one resolved policy."""

    def __init__(self, backend: Backend, policy: ResolvedPolicy, installed: Sequence[Installed]) -> None:
        self.policy = policy
        self.installed = tuple(installed)
        self._backend = backend
        self._by_id = {rule.id: rule for rule in policy.rules}
        targets = [Target(item.membrane.targets, item.floor) for item in installed]
        self._gate = Gate(backend, targets, self._phrases)
        self.strengths = torch.tensor([item.rule.strength for item in installed])

    def _phrases(self, text: str) -> list[list[str]]:
        hits = lexical_hits(self.policy, text)
        return [[hit.phrase for hit in hits if hit.rule == item.rule.id] for item in self.installed]

    def decide(self, states: Tensor, origins: Sequence[Origin | None]) -> list[Decision]:
        """Decides for rows of conditioning.

        Args:
            states: [rows, tokens, width], as the denoiser reads them.
            origins: Where each row came from; None where that is unknown.

        Returns:
            One decision per row. Rows encoded as negative prompts are allowed: a concept named there is already pushed
            away, and opening its membrane there would weaken that.
        """
        scores = self._gate.read(states, [origin.ids if origin else None for origin in origins])
        return [self._row(row, origin) for row, origin in zip(scores, origins, strict=True)]

    def decide_texts(self, texts: Sequence[str]) -> list[Decision]:
        """Decides for prompts without drawing: encodes them as the host does."""
        if not texts:
            return []
        ids = self._backend.tokenise(texts)
        origins = [Origin(tuple(row), text) for row, text in zip(ids.tolist(), texts, strict=True)]
        return self.decide(self._backend.encode(ids), origins)

    def permeability(self, decisions: Sequence[Decision]) -> Tensor:
        """Returns γ as [rows, membranes]."""
        rows = [[a.permeability for a in decision.activations] for decision in decisions]
        return torch.tensor(rows).view(len(rows), len(self.installed))

    def _row(self, scores: Sequence[Score], origin: Origin | None) -> Decision:
        pairs = list(zip(self.installed, scores, strict=True))
        if origin is not None and origin.negative:
            shut = tuple(Activation(item, score, 0.0) for item, score in pairs)
            return Decision(origin.text, False, shut, (), "allow", None, "a negative prompt opens nothing")
        if origin is None:
            return self._unknown(pairs)
        decoded = origin.text is None
        text = origin.text if origin.text is not None else self._backend.text_of(origin.ids)
        readings = self._backend.readings(origin.ids) if decoded else (text,)
        hits = tuple(dict.fromkeys(hit for reading in readings for hit in lexical_hits(self.policy, reading)))
        activations = tuple(Activation(item, score, score.permeability) for item, score in pairs)
        outcome, rule, reason = self._verdict(activations, hits)
        return Decision(text, decoded, activations, hits, outcome, rule, reason)

    def _verdict(
        self, activations: Sequence[Activation], hits: Sequence[Hit]
    ) -> tuple[Outcome, ResolvedRule | None, str]:
        found: list[tuple[Outcome, ResolvedRule, str]] = []
        for hit in hits:
            rule = self._by_id[hit.rule]
            if rule.effective == "refuse":
                why = "" if rule.has_membrane or rule.action == "refuse" else ", for which no membrane is installed"
                found.append(("refuse", rule, f"the prompt names {rule.concept.name!r} ({hit.phrase!r}){why}"))
            elif rule.effective == "flag":
                found.append(("flag", rule, f"the prompt names {rule.concept.name!r} ({hit.phrase!r})"))
        for activation in activations:
            if activation.opened:
                rule = activation.installed.rule
                found.append(("erase", rule, f"the membrane of {rule.concept.name!r} opens"))
        if not found:
            return "allow", None, "no rule is touched"
        return max(found, key=lambda entry: (_GRAVITY[entry[0]], entry[1].severity))

    def _unknown(self, pairs: Sequence[tuple[Installed, Score]]) -> Decision:
        """Decides for conditioning whose words are unknown, as `on_unknown` says; what needs words fails closed."""
        blind = [rule for rule in self.policy.rules if rule.effective == "refuse"]
        activations = tuple(Activation(item, score, 1.0) for item, score in pairs)
        if blind or self.policy.on_unknown == "refuse":
            rule = blind[0] if blind else None
            why = f"rule {blind[0].id!r} can only refuse prompts by their words" if blind else "on_unknown is refuse"
            reason = f"conditioning of unknown origin (no prompt text was seen), and {why}"
            return Decision(None, False, activations, (), "refuse", rule, reason)
        if not activations:
            return Decision(None, False, (), (), "allow", None, "conditioning of unknown origin; no rule erases")
        rule = max((a.installed.rule for a in activations), key=lambda r: r.severity)
        return Decision(
            None, False, activations, (), "erase", rule, "conditioning of unknown origin: every membrane opens fully"
        )
