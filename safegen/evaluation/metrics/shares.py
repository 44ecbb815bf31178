"""Shares of images, with what a sample of that size can tell."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True, slots=True)
class Share:
    """A share of images, with its 95 % Wilson score interval.

    Attributes:
        value: k / n.
        low: Lower end of the interval.
        high: Upper end.
        images: n.
    """

    value: float
    low: float
    high: float
    images: int

    @classmethod
    def of(cls, count: int, images: int) -> Share:
        """Returns the share of `count` in `images`.

            (p + z²/2n ± z √(p (1-p)/n + z²/4n²)) / (1 + z²/n),   z = 1.96                        (Wilson 1927)

        Args:
            count: k, between 0 and n.
            images: n ≥ 1.
        """
        interval = binomtest(count, images).proportion_ci(method="wilson")
        return cls(count / images, float(interval.low), float(interval.high), images)
