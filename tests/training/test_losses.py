"""The losses and the anchors' distributions against the paper's formulas, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from safegen.training.anchors import neighbour_weights, paper_weights, reference_anchors, standardised, with_named
from safegen.training.config import TrainConfig
from safegen.training.losses import anchoring_loss, effect, erasing_loss, erasing_target, total_loss

RNG = np.random.default_rng(0)
OPEN, SURROGATE, TARGET = (RNG.normal(size=(3, 4, 5, 5)) for _ in range(3))


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_the_erasing_loss_is_eq_4(eta: float) -> None:
    found = erasing_loss(torch.tensor(OPEN), torch.tensor(SURROGATE), torch.tensor(TARGET), eta)
    assert found.item() == pytest.approx(np.mean((OPEN - SURROGATE + eta * (TARGET - SURROGATE)) ** 2))


def test_the_erasing_target_lies_beyond_the_surrogate_as_seen_from_the_target() -> None:
    surrogate, target = torch.tensor(SURROGATE), torch.tensor(TARGET)
    assert torch.equal(erasing_target(surrogate, target, 0.0), surrogate)
    torch.testing.assert_close(erasing_target(surrogate, target, 1.0), 2 * surrogate - target)
    assert erasing_loss(erasing_target(surrogate, target, 2.0), surrogate, target, 2.0) == 0


@pytest.mark.parametrize(("signal", "noise"), [(0.8, 0.6), (0.3, 0.7)], ids=["v", "flow"])
def test_what_is_asked_for_is_the_same_prediction_in_every_form(signal: float, noise: float) -> None:
    """x_t = signal · x_0 + noise · ε. As v it is signal · ε - noise · x_0, as the velocity of a flow it is ε - x_0."""
    x_t = RNG.normal(size=OPEN.shape)

    def in_form(eps: np.ndarray) -> torch.Tensor:
        clean = (x_t - noise * eps) / signal
        return torch.tensor(eps - clean if signal + noise == 1 else signal * eps - noise * clean)

    wanted = erasing_target(in_form(SURROGATE), in_form(TARGET), 2.0)
    same = erasing_target(torch.tensor(SURROGATE), torch.tensor(TARGET), 2.0)
    torch.testing.assert_close(wanted, in_form(same.numpy()))


def test_the_total_is_eq_8() -> None:
    assert total_loss(torch.tensor(2.0), torch.tensor(3.0), 10.0) == 32


def test_the_effect_is_a_share_of_what_was_asked_for() -> None:
    target, wanted = torch.tensor(TARGET), torch.tensor(SURROGATE)
    assert effect(target, target, wanted) == 0
    assert effect(wanted, target, wanted) == pytest.approx(1)
    assert effect(target + (wanted - target) / 4, target, wanted) == pytest.approx(0.25)
    assert effect(wanted, target, target) == 0


def test_the_anchoring_loss_is_eq_7() -> None:
    found = anchoring_loss(torch.tensor(OPEN), torch.tensor(TARGET))
    assert found.item() == pytest.approx(np.mean((OPEN - TARGET) ** 2))
    assert anchoring_loss(torch.tensor(OPEN), torch.tensor(OPEN)) == 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_eq_6(alpha: float) -> None:
    cosines = np.array([-0.9, -0.1, 0.0, 0.5, 1.0])
    wanted = (1 - np.abs(cosines)) ** alpha
    found = paper_weights(torch.tensor(cosines), alpha)
    np.testing.assert_allclose(found.numpy(), wanted / wanted.sum())
    assert found[4] == 0  # the target itself is never an anchor


def test_eq_6_with_alpha_0_and_without_any_weight_is_uniform() -> None:
    for found in (paper_weights(torch.tensor([0.1, 0.9]), 0.0), paper_weights(torch.tensor([1.0, -1.0]), 1.0)):
        assert found.tolist() == [0.5, 0.5]


@given(
    cosines=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20),
    sharpness=st.floats(0, 10),
    uniform=st.floats(0, 1),
)
def test_neighbours_are_a_distribution_with_a_uniform_share(
    cosines: list[float], sharpness: float, uniform: float
) -> None:
    found = neighbour_weights(torch.tensor(cosines), sharpness, uniform)
    assert found.sum().item() == pytest.approx(1, abs=1e-4)
    assert found.min() >= uniform / len(cosines) - 1e-6
    order = np.argsort(cosines, kind="stable")
    assert (np.diff(found.numpy()[order]) >= -1e-6).all()  # nearer concepts are drawn at least as often


def test_neighbours_written_out() -> None:
    cosines = np.array([0.2, 0.5, 0.9])
    z = (cosines - cosines.mean()) / cosines.std(ddof=1)
    np.testing.assert_allclose(standardised(torch.tensor(cosines)).numpy(), z)
    near = np.exp(1.5 * z) / np.exp(1.5 * z).sum()
    np.testing.assert_allclose(neighbour_weights(torch.tensor(cosines), 1.5, 0.3).numpy(), 0.7 * near + 0.1)


def test_named_neighbours_share_what_is_made_room_for() -> None:
    found = with_named(torch.tensor([0.25, 0.75]), 3, 0.3)
    np.testing.assert_allclose(found.numpy(), [0.175, 0.525, 0.1, 0.1, 0.1], rtol=1e-6)
    assert with_named(torch.tensor([0.25, 0.75]), 0, 0.3).tolist() == [0.25, 0.75]


def test_anchors_as_released_are_noise_of_the_targets_size_that_eq_6_does_not_touch() -> None:
    target = torch.tensor(RNG.normal(size=(77, 768)), dtype=torch.float32)
    found = reference_anchors(target, 40, torch.Generator().manual_seed(0))
    assert found.shape == (40, 77, 768)
    norms = found.flatten(1).norm(dim=1) / target.norm()
    assert 0.8 <= norms.min() < 0.9
    assert 1.1 < norms.max() <= 1.2
    cosines = torch.cosine_similarity(found.flatten(1), target.flatten()[None])
    assert cosines.abs().max() < 0.02
    assert reference_anchors(target, 0, torch.Generator()).shape == (0, 77, 768)


def test_settings_are_strict_and_their_digest_covers_every_field() -> None:
    plain = TrainConfig(concept="ghost", targets=("ghost",))
    assert plain.digest() == TrainConfig(concept="ghost", targets=("ghost",)).digest()
    assert len(plain.digest()) == 64
    changes: dict[str, object] = dict(
        concept="fox",
        targets=("a",),
        surrogate="x",
        templates=(("a {}", "a"),),
        rank=2,
        alpha=2.0,
        eta=2.0,
        anchoring=1.0,
        anchors="paper",
        anchor_alpha=2.0,
        sharpness=1.0,
        iterations=1,
        learning_rate=1.0,
        batch=1,
        anchor_batch=1,
        trajectory_steps=2,
        trajectory_guidance=1.0,
        reuse=1,
        neighbours=("a skull",),
        schedule="constant",
        warmup=1,
        cycles=1,
        optimizer="adamw8bit",
        weight_decay=0.1,
        max_grad_norm=0.0,
        ema=0.9,
        trajectories=1,
        open_share=0.1,
        latent_sizes=(4,),
        adversarial_tokens=1,
        adversarial_steps=1,
        adversarial_rate=1.0,
        precision="bfloat16",
        checkpointing=True,
        seed=1,
    )
    assert changes.keys() == TrainConfig.model_fields.keys()
    digests = {plain.model_copy(update={name: value}).digest() for name, value in changes.items()}
    assert len(digests | {plain.digest()}) == len(changes) + 1
    for wrong in ({"iterationz": 1}, {"rank": 0}, {"targets": ()}, {"learning_rate": 0}, {"eta": -1}):
        with pytest.raises(ValidationError):
            TrainConfig.model_validate({"concept": "ghost", "targets": ("ghost",)} | wrong)
