"""What a training says to the denoiser: prompts that name a target, what remains of them, and anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from safegen.backend.base import Backend
from safegen.errors import TrainingError
from safegen.training.anchors import neighbour_weights, paper_weights, reference_anchors, with_named
from safegen.training.config import TrainConfig

_UNIFORM_SHARE = 0.3
_NAMED_SHARE = 0.3
_BATCH = 256  # prompts encoded at a time
_EMPTY = 10  # one anchor in so many is the empty prompt


class Prompts:
    """The prompts of one run, encoded."""

    def __init__(self, backend: Backend, configs: Sequence[TrainConfig], pool: Sequence[str]) -> None:
        """Encodes the pool.

        Args:
            backend: The host.
            configs: The settings of each concept; they share how anchors are drawn.
            pool: Captions that anchors are drawn from; those that name a target should be left out.

        Raises:
            TrainingError: The pool is empty.
        """
        if not pool:
            raise TrainingError("the anchor pool is empty; expected captions of what the membrane must leave alone")
        self._backend, self._configs, self._how = backend, configs, configs[0]
        named = [template.format(name) for c in configs for template, _ in c.templates for name in c.neighbours]
        self.empty = self.encode([""])
        self._pool = self.encode([*pool, *named])
        self._targets = [self.encode([c.targets[0]]) for c in configs]
        self._weights = torch.stack([self._near(target, len(named)) for target in self._targets]).mean(dim=0)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns the conditioning of texts, [texts, tokens, width]."""
        encode, tokenise = self._backend.encode, self._backend.tokenise
        parts = [encode(tokenise(texts[k : k + _BATCH])) for k in range(0, len(texts), _BATCH)]
        return torch.cat(parts)

    def _near(self, target: Tensor, named: int) -> Tensor:
        """Returns the probability of each caption as an anchor of one target; the last `named` were named by hand."""
        center = self.empty.mean(dim=1).float()
        captions = self._pool[: len(self._pool) - named].mean(dim=1).float()
        cosines = F.cosine_similarity(captions - center, target.mean(dim=1).float() - center).cpu()
        if self._how.anchors == "paper":
            weights = paper_weights(cosines, self._how.anchor_alpha)
        else:
            weights = neighbour_weights(cosines, self._how.sharpness, _UNIFORM_SHARE)
        return with_named(weights, named, _NAMED_SHARE)

    def targets(self, config: TrainConfig, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws prompts that name a target, and for each what remains once it is erased; [count, tokens, width]."""
        names = torch.randint(len(config.targets), (count,), generator=generator).tolist()
        chosen = torch.randint(len(config.templates), (count,), generator=generator).tolist()
        targets: list[str] = []
        surrogates: list[str] = []
        for name, k in zip(names, chosen, strict=True):
            template, rest = config.templates[k]
            targets.append(template.format(config.targets[name]))
            surrogates.append(template.format(config.surrogate) if config.surrogate else rest)
        return self.encode(targets), self.encode(surrogates)

    def anchors(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws prompts of the pool, [count, tokens, width]; of `anchors: reference`, noise in their place."""
        if self._how.anchors == "reference":
            which = int(torch.randint(len(self._targets), (1,), generator=generator))
            return reference_anchors(self._targets[which][0], count, generator)
        return self._pool[torch.multinomial(self._weights, count, replacement=True, generator=generator)]

    def anchors_with_empty(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """Draws anchors of which some are the empty prompt: one in ten of all `size` of an iteration, but at least one.

        Of `anchors: reference` half are: an interleaving slip of the released code puts them there.

        Args:
            count: How many are wanted here.
            size: How many anchors the iteration has.
            generator: Source of chance.
        """
        share = size // 2 if self._how.anchors == "reference" else max(1, size // _EMPTY)
        empty = min(share, count)
        others = [self.anchors(count - empty, generator)] if count > empty else []
        return torch.cat([self.empty.expand(empty, -1, -1), *others])
