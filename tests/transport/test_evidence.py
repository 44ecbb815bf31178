"""Which tokens did it."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_sd

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.transport.encoding import Token
from safegen.transport.evidence import Trigger, token_evidence, triggers
from safegen.transport.transport import Gate, Target


@pytest.fixture(scope="module")
def backend() -> Backend:
    return backend_of(tiny_sd())


def direction(backend: Backend, gate: Gate, text: str) -> torch.Tensor:
    ids = backend.tokenise([text])
    return gate.read(backend.encode(ids), [None], every=True).graded["direction"][0]


def test_evidence_is_the_fall_of_the_score_without_the_token(backend: Backend) -> None:
    gate = Gate(backend, [Target(("ghost",), {}), Target(("van gogh", "fox"), {})], lambda _: {})
    words = ["a", "ghost", "in", "the", "fox", "photo"]
    ids = backend.tokenise([" ".join(words)])[0].tolist()
    found = token_evidence(gate, backend, ids)
    assert found.shape == (6, 2)
    whole = direction(backend, gate, " ".join(words))
    for k in range(len(words)):
        without = direction(backend, gate, " ".join([*words[:k], *words[k + 1 :]]))
        assert found[k].tolist() == pytest.approx((whole - without).tolist(), abs=5e-6)


def test_a_full_window_and_an_empty_prompt(backend: Backend) -> None:
    gate = Gate(backend, [Target(("ghost",), {})], lambda _: {})
    full, empty = backend.tokenise(["fox " * 40, ""]).tolist()
    assert token_evidence(gate, backend, full).shape == (14, 1)
    assert bool(torch.isfinite(token_evidence(gate, backend, full)).all())
    assert token_evidence(gate, backend, empty).shape == (0, 1)
    assert token_evidence(Gate(backend, [], lambda _: {}), backend, full).shape == (14, 0)


def test_triggers_are_the_strong_tokens_joined() -> None:
    tokens = [Token(k, 2 * k, 2 * k + 1) for k in range(5)]
    found = triggers(torch.tensor([0.5, 0.75, 0.1, 1.0, -3.0], dtype=torch.float64), tokens)
    assert found == (Trigger(0, 3, "evidence", 0.75), Trigger(6, 7, "evidence", 1.0))
    assert triggers(torch.tensor([-1.0, 0.0]), tokens[:2]) == ()
    assert triggers(torch.zeros(0), ()) == ()
