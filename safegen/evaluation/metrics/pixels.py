"""What did not change at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def unchanged_pixels(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Returns the share of pixels that have the same value in all channels, over all pairs of images."""
    pairs = zip(before, after, strict=True)
    same = [np.equal(np.asarray(a), np.asarray(b)).all(axis=-1) for a, b in pairs]
    return float(np.mean(same))


def identical_images(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Returns the share of images that are the same, bit for bit."""
    same = [a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True)]
    return sum(same) / len(same)
