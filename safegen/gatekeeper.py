"""What the policy decides for rows of conditioning: the one place that the runtime and the prompt audit share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import torch
from torch import Tensor

from safegen.backend.base import Backend
from safegen.backend.conditioning import Origin
from safegen.decision import (
    GRAVITY,
    Activation,
    Decision,
    Encoders,
    Installed,
    Outcome,
    excepted,
    joined,
    target_of,
    uncalibrated,
    under,
    verdict_of,
)
from safegen.policy.context import Context, current, utc_now
from safegen.policy.hits import lexical_hits, located_hits
from safegen.policy.resolve import ResolvedPolicy, ResolvedRule
from safegen.transport.encoding import Token
from safegen.transport.evidence import Trigger, token_evidence, triggers
from safegen.transport.sentence import SentenceEncoder
from safegen.transport.transport import Gate, Reading

__all__ = ["Activation", "Decision", "Gatekeeper", "Installed", "Outcome"]


class Gatekeeper:
    """Decides, for one host and one resolved policy.

    Attributes:
        policy: The policy, for a caller without exceptions and whose task is not known.
        installed: The membranes that its rules use, in rule order.
        gate: Scores rows of conditioning for them.
        strengths: The policy author's constants, [membranes].
        notices: What the person who applies the policy should read about the gates.
    """

    def __init__(
        self,
        backend: Backend,
        policy: ResolvedPolicy,
        installed: Sequence[Installed],
        *,
        context: Context | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """Sets up the gates.

        Args:
            backend: The host.
            policy: The policy, with all its rules.
            installed: The membranes of the rules that use one.
            context: What is known of every caller.
            clock: The time that exceptions are held against.

        Raises:
            FormatError: A membrane's calibration cannot be read.
            UsageError: The sentence encoder cannot be loaded.
            UnsupportedBackendError: The text encoder returns values that are no numbers.
        """
        self.policy = policy
        self.installed = tuple(installed)
        self.backend = backend
        self._context, self._clock = context or {}, clock
        self._numbers = {item.rule.id: k for k, item in enumerate(installed)}
        used = {score for item in installed for score in item.rule.transport.score}
        sentence = SentenceEncoder(policy.sentence_encoder or "") if "semantic" in used else None
        encoders = Encoders(backend, sentence)
        found = [item.curves(encoders) for item in installed]
        targets = [target_of(item, *curves) for item, curves in zip(installed, found, strict=True)]
        self.gate = Gate(backend, targets, self._phrases, sentence=sentence)
        self.strengths = torch.tensor([item.rule.strength for item in installed])
        self.notices = uncalibrated(policy.id, self.installed, [missing for _, missing in found], encoders)

    def view(self) -> ResolvedPolicy:
        """Returns what the policy comes to for the caller of this thread or task, now."""
        return self.policy.at(self._clock(), current(self._context))

    def _phrases(self, text: str) -> Mapping[int, Sequence[str]]:
        found: dict[int, list[str]] = {}
        for hit in lexical_hits(self.policy, text):
            if hit.rule in self._numbers:
                found.setdefault(self._numbers[hit.rule], []).append(hit.phrase)
        return found

    def decide(
        self,
        states: Tensor,
        origins: Sequence[Origin | None],
        *,
        prompts: Sequence[Decision] = (),
        every: bool = False,
        evidence: bool | None = None,
    ) -> list[Decision]:
        """Decides for rows of conditioning.

        Args:
            states: [rows, tokens, width], as the denoiser reads them.
            origins: Where each row came from; None where that is unknown.
            prompts: What was decided for the prompts, where negative prompts have a call of their own.
            every: Computes all graded scores, also those that open nothing.
            evidence: Whether to find the tokens that open a membrane; by default as the policy's `audit.evidence` says.

        Returns:
            One decision per row. Rows encoded as negative prompts are not judged by their words: a concept named there
            is already pushed away, and opening its membrane there would weaken that. What `guidance: both` opens on
            them follows the prompts they are paired with.
        """
        reading = self.gate.read(
            states,
            [origin.ids if origin else None for origin in origins],
            given=[origin.text if origin else None for origin in origins],
            every=every,
        )
        looking = self.policy.audit.evidence == "opened" if evidence is None else evidence
        view = self.view()
        rules = {rule.id: rule for rule in view.rules}
        gammas: list[list[float]] = reading.permeability.tolist()
        rows = [
            None
            if origin is not None and origin.negative
            else self._row(_Row(view, rules, reading, k, gammas[k]), origin, looking)
            for k, origin in enumerate(origins)
        ]
        rows = [row and self._with_others(row, origins[k], every=every) for k, row in enumerate(rows)]
        wanted = [decision for decision in rows if decision is not None] or prompts
        negatives = [k for k, decision in enumerate(rows) if decision is None]
        paired: dict[int, Sequence[Decision]] = {n: [p] for n, p in zip(negatives, wanted, strict=False)}
        if len(negatives) != len(wanted):  # which belongs to which is not known
            paired = dict.fromkeys(negatives, wanted)
        full = [1.0] * len(self.installed)
        return [
            decision
            if decision is not None
            else self._negative(_Row(view, rules, reading, k, full), origins[k], paired[k])
            for k, decision in enumerate(rows)
        ]

    def decide_texts(
        self, texts: Sequence[str], *, every: bool = False, evidence: bool | None = None
    ) -> list[Decision]:
        """Decides for prompts without drawing: encodes them as the host does. See `decide`."""
        if not texts:
            return []
        ids = self.backend.tokenise(texts)
        origins = [Origin(tuple(row), text) for row, text in zip(ids.tolist(), texts, strict=True)]
        return self.decide(self.backend.encode(ids), origins, every=every, evidence=evidence)

    def _with_others(self, decision: Decision, origin: Origin | None, *, every: bool) -> Decision:
        """Opens and refuses for what other text encoders read, too, where that is another text or more of it.

        Their output is not scored by itself; their texts are encoded for the gate, a window at a time.
        """
        if origin is None or not origin.others:
            return decision
        pieces = [piece for text in origin.others for piece in self._pieces(text)]
        return joined(decision, self.decide_texts(pieces, every=every, evidence=False))

    def _pieces(self, text: str) -> list[str]:
        """Returns a text and, where it is longer than the encoder's window, its parts that fit."""
        tokens, size = self.backend.tokens(text), self.gate.window - 2
        starts = range(0, len(tokens), size) if len(tokens) > size else ()
        return [text, *(text[tokens[k].start : tokens[min(k + size, len(tokens)) - 1].end] for k in starts)]

    def permeability(self, decisions: Sequence[Decision]) -> Tensor:
        """Returns γ as [rows, membranes]."""
        rows = [[a.permeability for a in decision.activations] for decision in decisions]
        return torch.tensor(rows).view(len(rows), len(self.installed))

    def _activations(
        self,
        reading: Reading,
        row: int,
        gammas: Sequence[float],
        found: Mapping[int, tuple[Trigger, ...]] | None = None,
    ) -> tuple[Activation, ...]:
        return tuple(
            Activation(item, target, gamma, (found or {}).get(k, ()), _place=(reading, row, k))
            for k, (item, target, gamma) in enumerate(zip(self.installed, self.gate.targets, gammas, strict=True))
        )

    def _negative(self, row: _Row, origin: Origin | None, prompts: Sequence[Decision]) -> Decision:
        """Decides for an unconditional row: `guidance: both` opens on it what its prompts open; all if none is known.

        Args:
            row: With every membrane fully open.
            origin: Where it came from.
            prompts: What was decided for its prompts.
        """
        gammas = [
            max((decision.activations[k].permeability for decision in prompts), default=gamma)
            if item.rule.transport.guidance == "both"
            else 0.0
            for k, (item, gamma) in enumerate(zip(self.installed, row.let_through(self.installed), strict=True))
        ]
        activations = self._activations(row.reading, row.number, gammas)
        text = origin.text if origin is not None else None
        opened = [activation.installed.rule for activation in activations if activation.opened]
        if not row.reading.finite[row.number]:
            return self._broken(activations)
        if opened:
            rule = max(opened, key=lambda rule: rule.severity)
            return Decision(text, False, activations, (), "erase", rule, "opens as far as its prompt (guidance: both)")
        return Decision(text, False, activations, (), "allow", None, "a negative prompt opens nothing by itself")

    @staticmethod
    def _broken(activations: tuple[Activation, ...]) -> Decision:
        reason = (
            "the conditioning holds NaN or infinity, so that no gate can read it; expected finite numbers: load the "
            "text encoder in another number format, or look for what overflows"
        )
        return Decision(None, False, activations, (), "refuse", None, reason)

    def _row(self, row: _Row, origin: Origin | None, looking: bool) -> Decision:
        reading, size = row.reading, len(self.installed)
        if not reading.finite[row.number]:
            return self._broken(self._activations(reading, row.number, [1.0] * size))
        if origin is None:
            return self._unknown(row)
        decoded = origin.text is None
        text = origin.text if origin.text is not None else self._decoded(origin)
        readings = self._readings(origin) if decoded else (text,)
        hits = tuple(dict.fromkeys(hit for reading in readings for hit in lexical_hits(row.view, reading)))
        gammas = row.let_through(self.installed)
        opened = [k for k, gamma in enumerate(gammas) if gamma > 0]
        found = self._triggers(text, origin, opened, looking) if opened else {}
        activations = self._activations(reading, row.number, gammas, found)
        seen = [item.rule.id for item, gamma in zip(self.installed, row.gammas, strict=True) if gamma > 0]
        outcome, rule, reason = verdict_of(row.rules, seen, hits)
        exceptions = excepted(row.rules, [*seen, *(hit.rule for hit in hits)])
        truncated = 0 if decoded else self.truncated(text, origin.ids)
        return Decision(text, decoded, activations, hits, outcome, rule, reason, truncated, exceptions)

    def _chunks(self, origin: Origin) -> list[tuple[int, ...]]:
        return [origin.ids[k : k + self.gate.window] for k in range(0, len(origin.ids), self.gate.window)]

    def _decoded(self, origin: Origin) -> str:
        return " ".join(self.backend.text_of(chunk) for chunk in self._chunks(origin))

    def _readings(self, origin: Origin) -> tuple[str, ...]:
        readings = [self.backend.readings(chunk) for chunk in self._chunks(origin)]
        return tuple(dict.fromkeys(" ".join(found[k] for found in readings) for k in (0, -1)))

    def truncated(self, text: str, ids: Sequence[int]) -> int:
        """Returns how many tokens of a text are not among the token ids that the model reads."""
        return max(0, len(self.backend.tokens(text)) - len(self.backend.words(ids)))

    def _triggers(
        self, text: str, origin: Origin, opened: Sequence[int], looking: bool
    ) -> dict[int, tuple[Trigger, ...]]:
        """Returns the places in a prompt that open membranes: phrases and, if looked for, tokens."""
        found: dict[int, tuple[Trigger, ...]] = {}
        for one in sorted(located_hits(self.policy, text), key=lambda one: one.start):
            k = self._numbers.get(one.hit.rule, -1)
            if k in opened:
                found[k] = (*found.get(k, ()), Trigger(one.start, one.end, "lexical", 1.0, one.changes))
        if looking and len(origin.ids) <= self.gate.window:
            tokens = self.tokens_read(text, origin.ids)
            weights = token_evidence(self.gate, self.backend, origin.ids) if tokens else torch.zeros(0)
            for k in opened if tokens else ():
                found[k] = (*found.get(k, ()), *triggers(weights[:, k], tokens))
        return found

    def tokens_read(self, text: str, ids: Sequence[int]) -> tuple[Token, ...]:
        """Returns the tokens of a text that the model reads, with their places in it.

        Args:
            text: The prompt.
            ids: Its token ids, one window of them.

        Returns:
            The tokens; none where the text was decoded from ids and tokenises differently, so that places in it would
            be wrong.
        """
        read = [token for token, _ in self.backend.words(ids)]
        tokens = self.backend.tokens(text)[: len(read)]
        return tokens if [token.id for token in tokens] == read else ()

    def _unknown(self, row: _Row) -> Decision:
        """Decides for conditioning whose words are unknown, as `on_unknown` says; what needs words fails closed."""
        gammas = replace(row, gammas=[1.0] * len(self.installed)).let_through(self.installed)
        activations = self._activations(row.reading, row.number, gammas)
        blind = [rule for rule in row.view.rules if rule.effective == "refuse"]
        if blind or self.policy.on_unknown == "refuse":
            rule = blind[0] if blind else None
            why = f"rule {blind[0].id!r} can only refuse prompts by their words" if blind else "on_unknown is refuse"
            reason = f"conditioning of unknown origin (no prompt text was seen), and {why}"
            return Decision(None, False, activations, (), "refuse", rule, reason)
        concerned = [row.rules[item.rule.id] for item in self.installed if item.rule.id in row.rules]
        exceptions = excepted(row.rules, [rule.id for rule in concerned])
        if not concerned:
            reason = "conditioning of unknown origin; no rule erases"
            return Decision(None, False, activations, (), "allow", None, reason)
        rule = max(concerned, key=lambda rule: (GRAVITY[rule.effective], rule.severity))
        what = "every membrane opens fully" if rule.effective == "erase" else "only recorded"
        reason = f"conditioning of unknown origin: {what}{under(rule)}"
        return Decision(None, False, activations, (), rule.effective, rule, reason, exceptions=exceptions)


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of conditioning: what the policy comes to for its caller, and how far its scores would open membranes."""

    view: ResolvedPolicy
    rules: Mapping[str, ResolvedRule]
    reading: Reading
    number: int
    gammas: Sequence[float]

    def let_through(self, installed: Sequence[Installed]) -> list[float]:
        """Returns the permeabilities, 0 where the rule does not apply to the caller's task, or only flags."""
        kept: list[float] = []
        for item, gamma in zip(installed, self.gammas, strict=True):
            rule = self.rules.get(item.rule.id)
            kept.append(gamma if rule is not None and rule.effective != "flag" else 0.0)
        return kept
