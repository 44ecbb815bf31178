"""The membrane: one concept's factors, site by site."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safegen.errors import FormatError, ShapeMismatchError

MAX_NORM = 1e4  # largest Frobenius norm of one factor; trained membranes stay below 1e2


@dataclass(frozen=True, slots=True)
class Factor:
    """One site's pair of a membrane.

    Attributes:
        down: The regulator v_reg: [r, d_in] for a Linear, [r, c_in, kh, kw] for a Conv2d.
        up: The erasing signal v_sig: [d_out, r] for a Linear, [c_out, r, 1, 1] for a Conv2d.
        alpha: Numerator of `scale`; a positive number.
    """

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        if self.down.ndim != self.up.ndim or self.down.ndim not in (2, 4):
            raise ShapeMismatchError(
                f"down {list(self.down.shape)} and up {list(self.up.shape)}: expected [r, d_in] and [d_out, r], "
                "or [r, c_in, kh, kw] and [c_out, r, 1, 1]"
            )
        if self.down.shape[0] != self.up.shape[1] or self.down.shape[0] == 0 or self.up.shape[2:].numel() != 1:
            raise ShapeMismatchError(
                f"down {list(self.down.shape)} has rank {self.down.shape[0]}, up {list(self.up.shape)} has rank "
                f"{self.up.shape[1]}; expected the same rank of at least 1 and an up factor without a kernel"
            )
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise FormatError(f"alpha is {self.alpha}; expected a positive number")

    @property
    def rank(self) -> int:
        """Rank r of the pair."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Membrane:
    """A concept-SemiPermeable Membrane: the factors that erase one concept from one base model.

    Attributes:
        concept: Catalogue id of what it erases ("van-gogh").
        targets: The names it was trained to erase, first the main one ("Van Gogh", "vincent van gogh").
        base: Family id of the base model ("sd1", "mini").
        architecture: Digest of the base model's sites and their shapes.
        factors: One factor per site, keyed as in the file (`lora_unet_…`); never empty.
        surrogate: What the concept turns into; the empty prompt where it is "".
        metadata: Further strings from the file (training digest, calibration, …).
    """

    concept: str
    targets: tuple[str, ...]
    base: str
    architecture: str
    factors: Mapping[str, Factor]
    surrogate: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        if not self.factors:
            raise FormatError(f"membrane {self.concept!r} holds no factors; expected one per site")
        if not self.targets or not all(self.targets):
            raise FormatError(f"membrane {self.concept!r} names no target; expected at least one")

    def parameter_count(self) -> int:
        """Number of values in all factors."""
        return sum(f.down.numel() + f.up.numel() for f in self.factors.values())

    def check_acts(self) -> None:
        """Refuses a membrane that could be opened fully and would still change nothing.

        Raises:
            FormatError: In every pair, one of the two factors is zero.
        """
        if not any(bool(f.down.any()) and bool(f.up.any()) for f in self.factors.values()):
            raise FormatError(
                f"membrane {self.concept!r} erases nothing: all its products are zero; train it, or fetch it again"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every factor's tensors with their names in the file."""
        for key, factor in self.factors.items():
            yield f"{key}.lora_down.weight", factor.down
            yield f"{key}.lora_up.weight", factor.up
            yield f"{key}.alpha", torch.tensor(factor.alpha)

    def check_values(self) -> None:
        """Refuses values that no trained membrane has.

        Raises:
            FormatError: A factor holds NaN or infinity, or its norm is over `MAX_NORM`.
        """
        for name, tensor in self.tensors():
            values = tensor.float()
            if not torch.isfinite(values).all():
                raise FormatError(f"membrane {self.concept!r}: {name} holds NaN or infinity; expected finite numbers")
            norm = values.norm().item()
            if norm > MAX_NORM:
                raise FormatError(
                    f"membrane {self.concept!r}: {name} has norm {norm:.3g}; expected at most {MAX_NORM:g}"
                )
