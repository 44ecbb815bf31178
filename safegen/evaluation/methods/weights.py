"""Methods that change the denoiser's own weights: trained beside the model, installed and restored bit for bit."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.errors import NoMatchingSiteError, TrainingError
from safegen.evaluation.methods.base import Drawer, nbytes

CROSS_ATTENTION = "attn2"  # diffusers' name of the attention that reads the prompt


@dataclass(frozen=True, slots=True)
class Weights:
    """Changed weights of a denoiser.

    Attributes:
        changed: New value of each changed parameter, by its qualified name.
    """

    changed: Mapping[str, Tensor]

    @property
    def stored(self) -> int:
        """See `Eraser`: the changed weights."""
        return nbytes(self.changed.values())

    @contextmanager
    def on(self, pipe: Any) -> Generator[Drawer]:
        """See `Eraser`. Values are copied in and out, so that parameters stay the objects that they were."""
        parameters = dict(backend_of(pipe).denoiser.named_parameters())
        before = {name: parameters[name].detach().clone() for name in self.changed}
        try:
            _copy(self.changed, parameters)
            yield pipe
        finally:
            _copy(before, parameters)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def chosen(denoiser: nn.Module, names: Sequence[str], method: str) -> dict[str, Tensor]:
    """Returns copies of some of a denoiser's parameters, to train.

    Raises:
        NoMatchingSiteError: None are chosen.
    """
    if not names:
        raise NoMatchingSiteError(
            f"{method}: {type(denoiser).__name__} has none of the parameters that it changes "
            f"(it looks for {CROSS_ATTENTION!r} in their names)"
        )
    parameters = dict(denoiser.named_parameters())
    return {name: parameters[name].detach().clone().requires_grad_(True) for name in names}


class _Prediction(nn.Module):
    """The backend's prediction as a module, whose parameters can be replaced for one call."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.denoiser = backend.denoiser
        self._predict = backend.predict

    def forward(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return self._predict(x_t, t, states)


class Student:
    """A denoiser some of whose weights are trained; the model itself is the teacher and never changes."""

    def __init__(self, backend: Backend, names: Sequence[str], learning_rate: float, method: str) -> None:
        """Copies the parameters to train.

        Raises:
            NoMatchingSiteError: There are none.
        """
        self.parameters = chosen(backend.denoiser, names, method)
        self._prediction = _Prediction(backend)
        self._optimizer = torch.optim.Adam(self.parameters.values(), lr=learning_rate)

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Predicts noise with the trained weights."""
        replaced = {f"denoiser.{name}": value for name, value in self.parameters.items()}
        return torch.func.functional_call(self._prediction, replaced, (x_t, t, states))

    def step(self, loss: Tensor) -> None:
        """Takes one step of Adam.

        Raises:
            TrainingError: The loss is not finite.
        """
        refuse_not_finite(loss)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def finished(self) -> Weights:
        """Returns what was trained."""
        return Weights({name: value.detach() for name, value in self.parameters.items()})


def refuse_not_finite(loss: Tensor) -> None:
    """Stops a training whose loss is no number.

    Raises:
        TrainingError: It is not finite.
    """
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss is {loss.item()}; lower the method's learning_rate")
