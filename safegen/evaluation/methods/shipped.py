"""safegen: the shipped recipe, through its public surface (`safegen.training`); see docs/reference/training.md.

It is SPM's Eq. 8, `L = L_era + λ L_anc`, with anchors drawn towards the target's neighbours by the text encoder
(docs/decisions/0005). Look-alikes named by hand, which the zoo trains with, are left out here: the comparison counts
them among the neighbours, and no rival is told them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from safegen.backend import backend_of
from safegen.evaluation.methods.adapters import Adapters
from safegen.evaluation.methods.base import Kind, Target, Task, fewer
from safegen.training.config import TrainConfig
from safegen.training.recipe import Trainer


@dataclass(frozen=True, slots=True)
class Safegen:
    """The shipped recipe.

    Attributes:
        settings: Settings of the training that differ from the recipe's defaults.
    """

    name: ClassVar[str] = "safegen"
    kind: ClassVar[Kind] = "adapter"
    several: ClassVar[str] = "trained apart, outputs added (exact sum)"

    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    def scaled(self, effort: float) -> Self:
        """See `Method`."""
        if effort == 1:
            return self
        iterations = self.settings.get("iterations", TrainConfig.model_fields["iterations"].default)
        return replace(self, settings={**self.settings, "iterations": fewer(iterations, effort)})

    def config(self, target: Target, seed: int) -> TrainConfig:
        """Returns the settings of one target's training."""
        return TrainConfig(
            concept=target.concept,
            targets=target.names,
            templates=target.templates,
            surrogate=target.surrogate,
            seed=seed,
            **self.settings,
        )

    def make(self, pipe: Any, task: Task) -> Adapters:
        """See `Method`.

        Raises:
            TrainingError: There are no captions to keep, the loss is not finite, or the membrane changes nothing.
        """
        backend = backend_of(pipe)
        membranes = [
            Trainer(backend, self.config(target, task.seed), task.keep, pipe.scheduler).run() for target in task.targets
        ]
        return Adapters(tuple(membranes), both=False)
