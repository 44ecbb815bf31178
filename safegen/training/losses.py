"""The two losses of SPM (arXiv 2312.16145), as pure functions of what the denoiser predicts.

The paper writes them for a denoiser that predicts the noise. Here `eps_*` is whatever the host's denoiser predicts:
noise, v, or the velocity of a flow. At one x_t each of these is an affine function of the noise, and the wanted
prediction of Eq. 4 is an affine combination (its coefficients sum to 1), so it is the same prediction in every form;
what differs is only how much each timestep counts (docs/decisions/0016).
"""

from __future__ import annotations

from torch import Tensor


def erasing_target(eps_surrogate: Tensor, eps_target: Tensor, eta: float) -> Tensor:
    """What the open membrane should predict for the target prompt: `eps_sur - η (eps_tar - eps_sur)`.

    Args:
        eps_surrogate: Prediction for the surrogate prompt, membrane closed, [rows, …].
        eps_target: Prediction for the target prompt, membrane closed, same shape.
        eta: η ≥ 0; 0 lands on the surrogate, more pushes away from the target.
    """
    return eps_surrogate - eta * (eps_target - eps_surrogate)


def erasing_loss(eps_open: Tensor, eps_surrogate: Tensor, eps_target: Tensor, eta: float) -> Tensor:
    """SPM Eq. 4, as a mean over elements: ‖eps_M(c_tar) - eps(c_sur) + η (eps(c_tar) - eps(c_sur))‖².

    Args:
        eps_open: Prediction for the target prompt with the membrane open, [rows, …].
        eps_surrogate: Prediction for the surrogate prompt, membrane closed.
        eps_target: Prediction for the target prompt, membrane closed.
        eta: η of Eq. 4.
    """
    return (eps_open - erasing_target(eps_surrogate, eps_target, eta)).pow(2).mean()


def anchoring_loss(eps_open: Tensor, eps_closed: Tensor) -> Tensor:
    """SPM Eq. 7, as a mean over elements: ‖eps_M(c) - eps(c)‖² over anchor prompts c.

    Args:
        eps_open: Prediction for the anchors with the membrane open, [rows, …].
        eps_closed: The same with the membrane closed.
    """
    return (eps_open - eps_closed).pow(2).mean()


def total_loss(erasing: Tensor, anchoring: Tensor, weight: float) -> Tensor:
    """SPM Eq. 8: L = L_era + λ L_anc.

    Args:
        erasing: L_era, a scalar.
        anchoring: L_anc, a scalar.
        weight: λ ≥ 0.
    """
    return erasing + weight * anchoring


def effect(eps_open: Tensor, eps_target: Tensor, wanted: Tensor) -> float:
    """How far the membrane moves the target's prediction, in units of how far it should: ‖Δ‖ / ‖wanted - eps‖.

    Args:
        eps_open: Prediction for the target prompt with the membrane open, [rows, …].
        eps_target: The same with the membrane closed.
        wanted: What `erasing_target` asks for.

    Returns:
        0 for a membrane that changes nothing, about 1 for one that does what was asked.
    """
    asked = (wanted - eps_target).norm()
    return ((eps_open - eps_target).norm() / asked).item() if asked > 0 else 0.0
