"""The robust option: an adversary that brings the target back, and membranes that were trained against it."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_sd
from together import POOL, settings
from torch import Tensor

from safegen.backend import backend_of
from safegen.training.adversary import adversarial_states
from safegen.training.recipe import Trainer

GENERATOR = torch.Generator().manual_seed(0)


def test_only_the_last_positions_are_learned_and_they_keep_their_norms() -> None:
    start, hint = (torch.randn(3, 6, 8, generator=GENERATOR) for _ in range(2))
    goal = torch.randn(3, 6, 8, generator=GENERATOR)
    found = adversarial_states(lambda states: states, start, hint, goal, tokens=2, steps=30, rate=0.1)
    assert torch.equal(found[:, :4], start[:, :4])
    torch.testing.assert_close(found[:, 4:].norm(dim=-1), hint[:, 4:].norm(dim=-1))
    assert not found.requires_grad
    nearest = goal[:, 4:] * hint[:, 4:].norm(dim=-1, keepdim=True) / goal[:, 4:].norm(dim=-1, keepdim=True)
    assert (found[:, 4:] - nearest).norm() < 0.3 * (hint[:, 4:] - nearest).norm()


def test_more_tokens_than_there_are_learns_all_of_them() -> None:
    start, hint = (torch.randn(1, 4, 8, generator=GENERATOR) for _ in range(2))
    found = adversarial_states(lambda s: s, start, hint, torch.zeros(1, 4, 8), tokens=9, steps=1, rate=0.1)
    assert found.shape == start.shape
    assert (found != start).all()


def _brought_back(adversarial_tokens: int) -> float:
    """Trains, then attacks with more steps than the training did; how near the attack comes to the target."""
    pipe = tiny_sd(seed=3)
    backend = backend_of(pipe)
    changes: dict[str, Any] = dict(
        iterations=40, learning_rate=0.03, rank=4, batch=8, reuse=8, anchoring=1.0, schedule="cosine",
        adversarial_tokens=adversarial_tokens, adversarial_steps=3,
    )  # fmt: skip
    training = Trainer(backend, settings(processes=1).model_copy(update=changes), POOL, pipe.scheduler)
    training.run()
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(8, 4, 8, 8, generator=generator), torch.full((8,), 400)
    name = backend.encode(backend.tokenise(["ghost"])).expand(8, -1, -1)
    rest = backend.encode(backend.tokenise([""])).expand(8, -1, -1)
    student = training.student
    with student.attached():
        with torch.no_grad():
            wanted = student.predict(x, t, name, opened=None)
            erased = student.predict(x, t, name, opened=0)

        def predict(states: Tensor) -> Tensor:
            return student.predict(x, t, states, opened=0)

        found = adversarial_states(predict, rest, name, wanted, tokens=6, steps=12, rate=0.2)
        with torch.no_grad():
            return ((predict(found) - wanted).norm() / (erased - wanted).norm()).item()


def test_a_membrane_trained_against_it_is_harder_to_get_past() -> None:
    plain, robust = _brought_back(0), _brought_back(6)
    assert robust > 1.1 * plain
