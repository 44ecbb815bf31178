"""Judges policy tests with the whole gate of a model: scores, thresholds and installed membranes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from safegen.backend.conditioning import Origin
from safegen.guard import prepare
from safegen.policy.cases import Case
from safegen.policy.context import request_context, utc_now
from safegen.policy.schema import Policy
from safegen.policy.testing import Seen, WordsJudge, context_of


class GateJudge:
    """Judges as the runtime would, without drawing."""

    def __init__(self, pipe: Any, path: Path, policy: Policy, membranes: Sequence[Path]) -> None:
        """Prepares a policy on a pipeline.

        Raises:
            SafegenError: See `safegen.guard.prepare`.
        """
        self._words = WordsJudge(policy)
        self._now = utc_now()
        self._backend, self._policy, self._gatekeeper = prepare(
            pipe, path, membranes=membranes, clock=lambda: self._now
        )

    def rules(self) -> tuple[str, ...]:
        """Returns the ids of all rules, categories expanded."""
        return self._words.rules()

    def judge(self, case: Case, now: datetime) -> Sequence[Seen]:
        """Returns what a case does to the rules that apply to it; the negative prompt is judged beside the prompt."""
        self._now = now
        texts = [case.prompt, *([case.negative] if case.negative else [])]
        ids = self._backend.tokenise(texts)
        origins = [
            Origin(tuple(row), text, negative=k > 0)
            for k, (row, text) in enumerate(zip(ids.tolist(), texts, strict=True))
        ]
        with request_context(**context_of(case)):
            decisions = self._gatekeeper.decide(self._backend.encode(ids), origins, evidence=False)
            by_words = {rule.id for rule in self._gatekeeper.view().rules if rule.effective != "erase"}
        opened: dict[str, float] = {}
        for activation in (one for decision in decisions for one in decision.activations):
            rule = activation.installed.rule.id
            opened[rule] = max(opened.get(rule, 0.0), activation.permeability)
        named = {hit.rule for hit in decisions[0].hits} & by_words
        found: list[Seen] = []
        for seen in self._words.judge(case, now):
            permeability = opened.get(seen.rule, 0.0)
            found.append(replace(seen, permeability=permeability, touched=seen.rule in named or permeability > 0))
        return found
