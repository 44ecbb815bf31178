"""The cost of training is that of the same rows, ours and the released algorithm's, on one model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from tiny import tiny_sd
from torch import Tensor

from safegen.training.config import TrainConfig


@pytest.fixture(scope="module")
def bench() -> Any:
    return importlib.import_module("training")


def test_the_peer_makes_every_prediction_of_the_released_code(bench: Any) -> None:
    config = TrainConfig(concept="ghost", targets=("ghost",), batch=1, anchor_batch=4, trajectories=1)
    released = bench.Released(tiny_sd(), config, ("a fox", "a mouse"))
    calls: list[tuple[int | None, int, bool]] = []
    predict = released.student.predict

    def counted(x: Tensor, t: Tensor, states: Tensor, *, opened: int | None) -> Tensor:
        found = predict(x, t, states, opened=opened)
        calls.append((opened, len(x), found.requires_grad))
        return found

    released.student.predict = counted
    before = [p.detach().clone() for p in released.student.every]
    with released.student.attached():
        released.iterate()
    assert calls[-5:] == [(None, 2, False), (None, 2, False), (None, 8, False), (0, 2, True), (0, 8, True)]
    assert set(calls[:-5]) == {(0, 2, False)}
    assert 1 <= len(calls[:-5]) < 30
    assert any((p != b).any() for p, b in zip(released.student.every, before, strict=True))
