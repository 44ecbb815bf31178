"""The two losses of SPM (arXiv 2312.16145), as pure functions of predicted noise."""

from __future__ import annotations

from torch import Tensor


def erasing_target(eps_surrogate: Tensor, eps_target: Tensor, eta: float) -> Tensor:
    """What the open membrane should predict for the target prompt: `eps_sur - η (eps_tar - eps_sur)`.

    Args:
        eps_surrogate: Noise predicted for the surrogate prompt, membrane closed, [rows, c, h, w].
        eps_target: Noise predicted for the target prompt, membrane closed, same shape.
        eta: η ≥ 0; 0 lands on the surrogate, more pushes away from the target.
    """
    return eps_surrogate - eta * (eps_target - eps_surrogate)


def erasing_loss(eps_open: Tensor, eps_surrogate: Tensor, eps_target: Tensor, eta: float) -> Tensor:
    """SPM Eq. 4, as a mean over elements: ‖eps_M(c_tar) - eps(c_sur) + η (eps(c_tar) - eps(c_sur))‖².

    Args:
        eps_open: Noise predicted for the target prompt with the membrane open, [rows, c, h, w].
        eps_surrogate: Noise for the surrogate prompt, membrane closed.
        eps_target: Noise for the target prompt, membrane closed.
        eta: η of Eq. 4.
    """
    return (eps_open - erasing_target(eps_surrogate, eps_target, eta)).pow(2).mean()


def anchoring_loss(eps_open: Tensor, eps_closed: Tensor) -> Tensor:
    """SPM Eq. 7, as a mean over elements: ‖eps_M(c) - eps(c)‖² over anchor prompts c.

    Args:
        eps_open: Noise predicted for the anchors with the membrane open, [rows, c, h, w].
        eps_closed: The same with the membrane closed.
    """
    return (eps_open - eps_closed).pow(2).mean()
