r"""The product, written once: what open membranes add to the output of a site.

    y_b = W x_b + Σ_c γ_{b,c} · s_c · scale_c · up_c (down_c x_b)          (SPM Eq. 9, exact for every row b)

The membranes of one site are stacked: D = [K, d_in] and U = [d_out, K] with K the sum of their ranks, and one
coefficient per row and stacked rank. Stacking computes the sum of products; summing the factors before the product, as
the reference code does, would add cross terms between concepts (docs/decisions/0003).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safegen.errors import ShapeMismatchError
from safegen.membrane.weights import Factor

Site = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True)
class Stack:
    """The factors of several membranes at one site.

    Attributes:
        down: [K, d_in] (Linear) or [K, c_in, kh, kw] (Conv2d).
        up: [d_out, K] or [c_out, K, 1, 1], each membrane's part multiplied by its `scale`.
        ranks: Rank of each membrane, in order; they sum to K.
    """

    down: Tensor
    up: Tensor
    ranks: tuple[int, ...]


def check_fits(name: str, module: Site, factor: Factor) -> None:
    """Refuses a factor that does not belong to this site.

    Raises:
        ShapeMismatchError: Says which shapes the site needs and which the factor has.
    """
    if isinstance(module, nn.Linear):
        wanted = ([factor.rank, module.in_features], [module.out_features, factor.rank])
    else:
        if module.groups != 1:
            raise ShapeMismatchError(f"site {name}: a grouped convolution ({module.groups} groups) carries no membrane")
        wanted = (
            [factor.rank, module.in_channels, *module.kernel_size],
            [module.out_channels, factor.rank, 1, 1],
        )
    found = (list(factor.down.shape), list(factor.up.shape))
    if found != wanted:
        raise ShapeMismatchError(
            f"site {name}: expected down {wanted[0]} and up {wanted[1]}, found down {found[0]} and up {found[1]}"
        )


def stack(factors: Sequence[Factor], like: Tensor) -> Stack:
    """Stacks the factors of one site, on the device and in the dtype of `like`.

    Args:
        factors: One per membrane, in the order of the coefficients' columns.
        like: The site's input (its weight may be stored in another dtype, or quantised).
    """
    down = torch.cat([f.down.to(like.device, like.dtype) for f in factors], dim=0)
    up = torch.cat([(f.up.to(like.device, torch.float32) * f.scale).to(like.dtype) for f in factors], dim=1)
    return Stack(down, up, tuple(f.rank for f in factors))


def project(module: Site, x: Tensor, down: Tensor) -> Tensor:
    """Computes `down x`: [rows, …, K] (Linear), or [rows, K, h, w] with the site's stride and padding (Conv2d)."""
    if isinstance(module, nn.Linear):
        return F.linear(x, down)
    if module.padding_mode == "zeros":
        return F.conv2d(x, down, None, module.stride, module.padding, module.dilation)
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    return F.conv2d(padded, down, None, module.stride, 0, module.dilation)


def expand(module: Site, h: Tensor, up: Tensor) -> Tensor:
    """Computes `up h`, the inverse layout of `project`."""
    return F.linear(h, up) if isinstance(module, nn.Linear) else F.conv2d(h, up)


def weighted(module: Site, h: Tensor, coefficients: Tensor) -> Tensor:
    """Multiplies projections by coefficients [rows, K], one per row and stacked rank; 0 leaves a projection out."""
    middle = (1,) * (h.ndim - 2)
    shape = (len(coefficients), *middle, -1) if isinstance(module, nn.Linear) else (*coefficients.shape, *middle)
    sizes = coefficients.to(h.dtype).view(shape)
    return (h * sizes).masked_fill(sizes == 0, 0)  # 0·inf is nan, and the row may be open for another membrane


def add_delta(module: Site, x: Tensor, y: Tensor, stacked: Stack, coefficients: Tensor, rows: Tensor | None) -> Tensor:
    """Adds the open membranes' output to `y`.

    Rows that are closed are not touched at all, not even by adding zero: in fp16 a product with an infinite
    activation would make 0·inf = nan, and a closed row must stay the base model's bit for bit.

    Args:
        module: The site.
        x: The site's input, [rows, …].
        y: The base module's output for `x`.
        stacked: The membranes.
        coefficients: [open rows, K]: γ·s of each open row and stacked rank.
        rows: Indices of the open rows; None where all rows are open.

    Returns:
        `y` plus the delta, a new tensor.
    """
    part = x if rows is None else x.index_select(0, rows)
    delta = expand(module, weighted(module, project(module, part, stacked.down), coefficients), stacked.up)
    # A clone keeps the memory layout of `y`, which later kernels, and so the closed rows' last bits, depend on.
    return y + delta if rows is None else y.clone().index_add_(0, rows, delta)


def delta_norms(module: Site, x: Tensor, stacked: Stack, coefficients: Tensor) -> Tensor:
    """Measures each membrane's own output.

    Args:
        module: The site.
        x: The site's input for the rows of `coefficients`.
        stacked: The membranes.
        coefficients: [rows, K].

    Returns:
        ‖γ s scale · up (down x)‖ per row and membrane, [rows, membranes], without forming any d_out-sized product.
    """
    h = weighted(module, project(module, x, stacked.down), coefficients).float()
    if isinstance(module, nn.Conv2d):
        h = h.flatten(2).transpose(1, 2)
    elif h.ndim > 3:
        h = h.flatten(1, -2)
    up = stacked.up.float().flatten(1)
    norms: list[Tensor] = []
    start = 0
    for rank in stacked.ranks:
        part, factor = h[..., start : start + rank], up[:, start : start + rank]
        gram = factor.T @ factor
        squares = torch.einsum("btk,kl,btl->b", part, gram, part) if part.ndim == 3 else (part @ gram * part).sum(-1)
        norms.append(squares.clamp(min=0).sqrt())
        start += rank
    return torch.stack(norms, dim=1)
