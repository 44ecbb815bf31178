"""Concept ablation, model-based (arXiv 2303.13516): the target's prompts come to mean an anchor concept.

    L = ‖sg[ε_θ(x_t, c, t)] - ε_θ(x_t, c*, t)‖² + λ ‖ε_θ(x_t, c, t) - ε‖²        (model-based, with its regulariser)

c is a prompt of the anchor concept, c* the same prompt of the target, x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε with x_0 drawn by the
model for c; sg stops the gradient. Trained are the keys and values of the cross-attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.errors import UsageError
from safegen.evaluation.methods.base import Kind, Task, fewer
from safegen.evaluation.methods.host import denoise, encode, frozen, leading
from safegen.evaluation.methods.weights import CROSS_ATTENTION, Student, Weights


@dataclass(frozen=True, slots=True)
class ConceptAblation:
    """Concept ablation.

    Attributes:
        iterations: Iterations; the paper takes 100 of eight rows for an object, twice that for a style.
        learning_rate: Learning rate of Adam; the paper takes 2e-6 per row of the batch.
        regularising: λ.
        batch: Rows an iteration.
        images: Images of the anchor; the paper draws 1,000.
        steps: Sampler steps of these images.
        guidance: Their guidance.
    """

    name: ClassVar[str] = "concept-ablation"
    kind: ClassVar[Kind] = "weights"
    several: ClassVar[str] = "joint: every row is of a target drawn at random"

    iterations: int = 60
    learning_rate: float = 3e-4
    regularising: float = 1.0
    batch: int = 4
    images: int = 32
    steps: int = 12
    guidance: float = 4.0

    def scaled(self, effort: float) -> Self:
        """See `Method`."""
        return replace(self, iterations=fewer(self.iterations, effort), images=fewer(self.images, effort))

    def make(self, pipe: Any, task: Task) -> Weights:
        """See `Method`.

        Raises:
            UsageError: A target names no anchor concept.
            NoMatchingSiteError: The denoiser has no cross-attention.
            TrainingError: The loss is not finite.
        """
        missing = [target.concept for target in task.targets if not target.anchor]
        if missing:
            raise UsageError(f"{self.name}: {', '.join(missing)} has no anchor concept; name one in Target.anchor")
        backend = backend_of(pipe)
        generator = torch.Generator().manual_seed(task.seed)
        pairs = [
            (template.format(name), template.format(target.anchor))
            for target in task.targets
            for template, _ in target.templates
            for name in target.names
        ]
        targets, anchors = (encode(backend, texts) for texts in zip(*pairs, strict=True))
        which, x_0 = self._images(backend, pipe.scheduler, anchors, generator)
        alphas = pipe.scheduler.alphas_cumprod
        with frozen(backend.denoiser):
            names = [n for n, _ in backend.denoiser.named_parameters() if n.endswith(_KEYS_AND_VALUES)]
            student = Student(backend, names, self.learning_rate, self.name)
            for _ in range(self.iterations):
                k = torch.randint(len(x_0), (self.batch,), generator=generator)
                t = torch.randint(len(alphas), (self.batch,), generator=generator)
                noise = torch.randn(self.batch, *x_0.shape[1:], generator=generator)
                level = alphas[t].view(-1, 1, 1, 1)
                x_t = level.sqrt() * x_0[k] + (1 - level).sqrt() * noise
                both = torch.cat([anchors[which[k]], targets[which[k]]])
                eps_anchor, eps_target = student.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
                student.step(ablation_loss(eps_anchor, eps_target, noise, self.regularising))
        return student.finished()

    def _images(
        self, backend: Backend, scheduler: Any, anchors: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draws latents x_0 of anchor prompts, [images, c, h, w], and says of which prompt each is."""
        which = torch.randint(len(anchors), (self.images,), generator=generator)
        empty, ddim = encode(backend, [""]), leading(scheduler)
        drawn: list[Tensor] = []
        for part in which.split(_AT_A_TIME):
            start = torch.randn(len(part), *backend.latent_shape, generator=generator)
            noisy = denoise(
                backend.predict, ddim, start, anchors[part], empty, steps=self.steps, guidance=self.guidance
            )
            drawn.append(noisy.final)
        return which, torch.cat(drawn)


_KEYS_AND_VALUES = tuple(f"{CROSS_ATTENTION}.to_{part}.weight" for part in "kv")
_AT_A_TIME = 16  # images denoised together


def ablation_loss(eps_anchor: Tensor, eps_target: Tensor, noise: Tensor, regularising: float) -> Tensor:
    """The loss above, as means over elements.

    Args:
        eps_anchor: Trained model, the anchor's prompt, [rows, c, h, w].
        eps_target: Trained model, the target's prompt, same shape.
        noise: ε that made x_t.
        regularising: λ.
    """
    matching = (eps_anchor.detach() - eps_target).square().mean()
    return matching + regularising * (eps_anchor - noise).square().mean()
