"""ESD, Erased Stable Diffusion (arXiv 2303.07345): fine-tuning towards the opposite of classifier-free guidance.

    ε_θ(x_t, c, t) ← ε_θ*(x_t, t) - η [ε_θ*(x_t, c, t) - ε_θ*(x_t, t)]                     (Eq. 7)

θ* is the frozen model, ε(x_t, t) its prediction for the empty prompt (or for the target's surrogate), and x_t comes
from trajectories of the model being trained, denoised for c with guidance. ESD-x trains the cross-attention, ESD-u the
rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from safegen.backend import backend_of
from safegen.evaluation.methods.base import Kind, Task, fewer
from safegen.evaluation.methods.host import Supply, encode, frozen
from safegen.evaluation.methods.weights import CROSS_ATTENTION, Student, Weights

_LEFT_ALONE = ("time_embedding.", "time_proj.", "conv_out.")  # as in the authors' code


def esd_target(eps_empty: Tensor, eps_concept: Tensor, eta: float) -> Tensor:
    """What the trained model should predict for the concept (Eq. 7).

    Args:
        eps_empty: Frozen model, empty prompt, [rows, c, h, w].
        eps_concept: Frozen model, the concept, same shape.
        eta: η.
    """
    return eps_empty - eta * (eps_concept - eps_empty)


@dataclass(frozen=True, slots=True)
class EsdX:
    """ESD-x: trains the cross-attention, for concepts that a prompt names.

    Attributes:
        iterations: Iterations; the paper takes 1,000 of one row.
        learning_rate: Learning rate of Adam; the paper takes 1e-5.
        eta: η of Eq. 7.
        batch: Rows an iteration.
        steps: Sampler steps of the trajectories.
        guidance: Their guidance; 3 in the authors' code.
        reuse: Iterations that share trajectories.
    """

    name: ClassVar[str] = "esd-x"
    kind: ClassVar[Kind] = "weights"
    several: ClassVar[str] = "joint: every row is of a target drawn at random"

    iterations: int = 100
    learning_rate: float = 1e-4
    eta: float = 1.0
    batch: int = 4
    steps: int = 12
    guidance: float = 3.0
    reuse: int = 8

    def parameters(self, denoiser: nn.Module) -> list[str]:
        """Returns the names of what is trained: cross-attention."""
        return [name for name, _ in denoiser.named_parameters() if CROSS_ATTENTION in name]

    def scaled(self, effort: float) -> Self:
        """See `Method`."""
        return replace(self, iterations=fewer(self.iterations, effort))

    def make(self, pipe: Any, task: Task) -> Weights:
        """See `Method`.

        Raises:
            NoMatchingSiteError: The denoiser has no parameters to train.
            TrainingError: The loss is not finite.
        """
        backend = backend_of(pipe)
        generator = torch.Generator().manual_seed(task.seed)
        pairs = [(name, target.surrogate) for target in task.targets for name in target.names]
        concepts, empties = (encode(backend, texts) for texts in zip(*pairs, strict=True))
        supply = Supply(
            backend, pipe.scheduler, concepts, generator, steps=self.steps, guidance=self.guidance, reuse=self.reuse
        )
        with frozen(backend.denoiser):
            student = Student(backend, self.parameters(backend.denoiser), self.learning_rate, self.name)
            for _ in range(self.iterations):
                with torch.no_grad():
                    x, t, index = supply.draw(student.predict, self.batch)
                    both = torch.cat([empties[index], concepts[index]])
                    eps_empty, eps_concept = backend.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
                wanted = esd_target(eps_empty, eps_concept, self.eta)
                student.step((student.predict(x, t, concepts[index]) - wanted).square().mean())
        return student.finished()


@dataclass(frozen=True, slots=True)
class EsdU(EsdX):
    """ESD-u: trains everything but the cross-attention, for concepts that appear unasked."""

    name: ClassVar[str] = "esd-u"

    def parameters(self, denoiser: nn.Module) -> list[str]:
        """Returns the names of what is trained: all but cross-attention, time embedding and the last convolution."""
        names = (name for name, _ in denoiser.named_parameters())
        return [name for name in names if CROSS_ATTENTION not in name and not name.startswith(_LEFT_ALONE)]
