"""Whether the unconditional row should open too: what is erased, what is kept, and how far the images move."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from safegen import apply_policy
from safegen.audit import HmacKey
from safegen.evaluation.erasure import Drawn, cases, draw_cases
from safegen.mini import zoo
from safegen.mini.catalogue import Object
from safegen.mini.judge import Judge

_KEY = HmacKey(b"a fixed key of the benchmark ...")


def _rest_kept(drawn: Drawn, concept: str) -> float:
    """Share of the images that keep what the prompt asks for beside the concept: the style, or the object."""
    if isinstance(zoo.find(concept), Object):
        pairs = [(c.style, seen) for c, seen in zip(drawn.cases, drawn.styles, strict=True) if c.style]
    else:
        pairs = [(c.object, seen) for c, seen in zip(drawn.cases, drawn.objects, strict=True) if c.object]
    return sum(asked == seen for asked, seen in pairs) / len(pairs)


def compare(pipe: Any, judge: Judge, concept: str, images: int) -> dict[str, dict[str, float]]:
    """Draws prompts that name a concept without a policy and under both settings, from the same seeds.

    Returns:
        For each setting of `guidance`: shares in [0, 1] judged as the concept before and after, share that keeps the
        rest of the prompt, and the mean absolute change of the pixels in [0, 1].
    """
    asked = cases(pipe, concept, "target", images, seed=11)
    before = draw_cases(pipe, judge, asked, seed=90_000, label=f"{concept} base")
    found: dict[str, dict[str, float]] = {}
    for guidance in ("conditional", "both"):
        with tempfile.TemporaryDirectory() as name:
            policy = Path(name) / "policy.yaml"
            policy.write_text(
                "apiVersion: safegen.dev/v1\nkind: Policy\nmetadata: {id: guidance, version: 1.0.0}\n"
                f"defaults: {{transport: {{guidance: {guidance}}}}}\n"
                f"rules:\n  - {{id: {concept}, concept: {concept}, category: custom, on_missing: error}}\n"
            )
            with apply_policy(pipe, policy, audit=Path(name) / "audit", audit_key=_KEY):
                after = draw_cases(pipe, judge, asked, seed=90_000, label=f"{concept} {guidance}")
        moved = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() / 255 for a, b in _pairs(before, after)]
        found[guidance] = {
            "before": before.judged_as(concept),
            "after": after.judged_as(concept),
            "rest kept": _rest_kept(after, concept),
            "mean pixel change": float(np.mean(moved)),
        }
    return found


def _pairs(before: Drawn, after: Drawn) -> list[tuple[Any, Any]]:
    return list(zip(before.images, after.images, strict=True))
