"""UCE, Unified Concept Editing (arXiv 2308.14761): a closed-form edit of the cross-attention's keys and values.

    min_W Σ_{c_i ∈ E} ‖W c_i - W_old c*_i‖² + s Σ_{c_j ∈ P} ‖W c_j - W_old c_j‖² + λ ‖W - W_old‖²

    W = W_old (Σ_E c*_i c_iᵀ + s Σ_P c_j c_jᵀ + λ I) (Σ_E c_i c_iᵀ + s Σ_P c_j c_jᵀ + λ I)⁻¹      (Eq. 7)

c are token embeddings: of a prompt that names a target from its last token on, paired with those of what it should mean
from its own last token on; of the captions to keep, all of them. The paper has λ = 0 and s = 1; its code has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.evaluation.methods.base import Kind, Task, Untrained
from safegen.evaluation.methods.host import encode
from safegen.evaluation.methods.weights import CROSS_ATTENTION, Weights, chosen


def solve(weight: Tensor, edited: Tensor, meant: Tensor, kept: Tensor, preserve: float, ridge: float) -> Tensor:
    """Returns the edited weight (Eq. 7), solved in float64.

    Args:
        weight: W_old, [d_out, d].
        edited: c_i, [n, d].
        meant: c*_i, [n, d].
        kept: c_j, [m, d]; m may be 0.
        preserve: s ≥ 0.
        ridge: λ > 0.
    """
    old, c, meant, kept = (tensor.detach().double() for tensor in (weight, edited, meant, kept))
    common = preserve * kept.T @ kept + ridge * torch.eye(c.shape[1], dtype=torch.float64, device=c.device)
    left, right = old @ (meant.T @ c + common), c.T @ c + common
    return torch.linalg.solve(right, left, left=False).to(weight.dtype)


def _from_last(backend: Backend, texts: Sequence[str]) -> list[Tensor]:
    """Returns for each text the conditioning from its last real token on, [tokens, width]."""
    ids = backend.tokenise(texts)
    states = encode(backend, texts)
    return [row[len(backend.words(i)) :] for row, i in zip(states, ids.tolist(), strict=True)]  # the begin token is 0


@dataclass(frozen=True, slots=True)
class Uce(Untrained):
    """UCE.

    Attributes:
        preserve: s, weight of the captions to keep against the edited prompts.
        ridge: λ, how far each weight holds on to its old value.
    """

    name: ClassVar[str] = "uce"
    kind: ClassVar[Kind] = "weights"
    several: ClassVar[str] = "joint: one closed form for all"

    preserve: float = 0.1
    ridge: float = 0.1

    @torch.no_grad()
    def make(self, pipe: Any, task: Task) -> Weights:
        """See `Method`.

        Raises:
            NoMatchingSiteError: The denoiser has no cross-attention.
        """
        backend = backend_of(pipe)
        names = [
            name
            for name, _ in backend.denoiser.named_parameters()
            if name.endswith((f"{CROSS_ATTENTION}.to_k.weight", f"{CROSS_ATTENTION}.to_v.weight"))
        ]
        weights = chosen(backend.denoiser, names, self.name)
        prompts, rests = zip(*(pair for target in task.targets for pair in target.prompts()), strict=True)
        edited: list[Tensor] = []
        meant: list[Tensor] = []
        for c, wanted in zip(_from_last(backend, prompts), _from_last(backend, rests), strict=True):
            shared = min(len(c), len(wanted))
            edited.append(c[:shared])
            meant.append(wanted[:shared])
        pairs = torch.cat(edited), torch.cat(meant)
        kept = encode(backend, task.keep).flatten(0, 1) if task.keep else pairs[0][:0]
        return Weights(
            {name: solve(old, *pairs, kept, self.preserve, self.ridge).detach() for name, old in weights.items()}
        )
