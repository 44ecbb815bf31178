"""The figures of one comparison: the same cases drawn before and after, judged by the independent judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from safegen.evaluation.erasure import Drawn
from safegen.evaluation.metrics.frechet import frechet_distance
from safegen.evaluation.metrics.harmonic import mace_mean, speed_mean
from safegen.evaluation.metrics.pixels import identical_images, unchanged_pixels
from safegen.evaluation.metrics.shares import Share
from safegen.mini import zoo
from safegen.mini.judge import Judge


@dataclass(frozen=True, slots=True)
class Change:
    """One share, before and after."""

    before: Share
    after: Share


@dataclass(frozen=True, slots=True)
class Comparison:
    """One group of cases, drawn before and after from the same noise.

    Attributes:
        concept: The concept that they are about.
        before: Drawn by the base model.
        after: Drawn erased.
    """

    concept: str
    before: Drawn
    after: Drawn

    def named(self) -> Change:
        """Share of the images judged as the concept."""
        return self._change([d.hits(self.concept) for d in (self.before, self.after)])

    def accuracy(self) -> Change:
        """Share of the images that show what their prompts ask for."""
        return self._change([d.right() for d in (self.before, self.after)])

    @staticmethod
    def _change(flags: Sequence[Sequence[bool]]) -> Change:
        return Change(*(Share.of(sum(each), len(each)) for each in flags))


@dataclass(frozen=True, slots=True)
class Figures:
    """What one method did.

    Attributes:
        target: Images of the targets judged as their target.
        neighbour: Accuracy on the targets' neighbours.
        unrelated: Accuracy on what is near no shipped concept.
        drift: Fréchet distance between the judge's features of non-targets before and after.
        unchanged_pixels: Share of pixels unchanged on unrelated prompts.
        identical: Share of the images of unrelated prompts that are bit-identical.
        speed: Harmonic mean as used by SPEED, of what is erased and what is kept (the mean of both accuracies).
        mace: Harmonic mean as used by MACE; None where no prompt has another name of a target.
    """

    target: Change
    neighbour: Change
    unrelated: Change
    drift: float
    unchanged_pixels: float
    identical: float
    speed: float
    mace: float | None

    @property
    def kept(self) -> float:
        """Mean of the accuracies on neighbours and on unrelated prompts, after."""
        return _kept(self.neighbour, self.unrelated)


def _kept(neighbour: Change, unrelated: Change) -> float:
    return (neighbour.after.value + unrelated.after.value) / 2


def figures(
    judge: Judge, targets: Sequence[Comparison], neighbours: Sequence[Comparison], unrelated: Comparison
) -> Figures:
    """Computes the figures of one method.

    Args:
        judge: The independent judge.
        targets: Cases that name each target.
        neighbours: Cases of each target's neighbours.
        unrelated: Cases of neither.
    """
    rest = [*neighbours, unrelated]
    drift = frechet_distance(
        _features(judge, [image for each in rest for image in each.before.images]),
        _features(judge, [image for each in rest for image in each.after.images]),
    )
    erased = _pooled([each.named() for each in targets])
    near, far = _pooled([each.accuracy() for each in neighbours]), unrelated.accuracy()
    kept = _kept(near, far)
    main, other = _by_name(targets)
    return Figures(
        target=erased,
        neighbour=near,
        unrelated=far,
        drift=drift,
        unchanged_pixels=unchanged_pixels(unrelated.before.images, unrelated.after.images),
        identical=identical_images(unrelated.before.images, unrelated.after.images),
        speed=speed_mean(erased.after.value, kept),
        mace=mace_mean(_mean(main), kept, _mean(other)) if main and other else None,
    )


def _features(judge: Judge, images: list[Image.Image]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return judge.pictures(images).features.double().numpy()


def _mean(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def _pooled(changes: Sequence[Change]) -> Change:
    def pool(shares: Sequence[Share]) -> Share:
        return Share.of(round(sum(s.value * s.images for s in shares)), sum(s.images for s in shares))

    return Change(pool([c.before for c in changes]), pool([c.after for c in changes]))


def _by_name(targets: Sequence[Comparison]) -> tuple[list[bool], list[bool]]:
    """Tells for each image whether its target is still seen: prompts with the main name, and those with another."""
    main: list[bool] = []
    other: list[bool] = []
    for each in targets:
        name = zoo.find(each.concept).name
        for case, seen in zip(each.after.cases, each.after.hits(each.concept), strict=True):
            (main if name in case.prompt else other).append(seen)
    return main, other
