r"""The product, written once: what open membranes add to the output of a site.

    y_b = W x_b + Σ_c γ_{b,c} · s_c · scale_c · up_c (down_c x_b)          (SPM Eq. 9, exact for every row b)

The membranes of one site are stacked: D = [K, d_in] and U = [K, d_out] with K the sum of their ranks, and one
coefficient per row and stacked rank. Stacking computes the sum of products; summing the factors before the product, as
the reference code does, would add cross terms between concepts (docs/decisions/0003). The last product is accumulated
into the base output itself, so that it is rounded once, whatever the number of membranes, and needs no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safegen.errors import ShapeMismatchError
from safegen.membrane.weights import Factor, Membrane

Site = nn.Linear | nn.Conv2d
Rows = slice | Tensor | None
"""Which rows are open: a run of them, their indices, or (None) all."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The factors of several membranes at one site.

    Attributes:
        down: [K, d_in] (Linear) or [K, c_in, kh, kw] (Conv2d).
        up: [K, d_out], transposed against a file's, so that choosing membranes chooses rows of both.
    """

    down: Tensor
    up: Tensor

    def to(self, like: Tensor) -> Stack:
        """Returns the stack on the device and in the dtype of `like`; itself where it is there already."""
        if self.down.dtype == like.dtype and self.down.device == like.device:
            return self
        return Stack(self.down.to(like.device, like.dtype), self.up.to(like.device, like.dtype))

    def choose(self, ranks: slice | Tensor) -> Stack:
        """Returns some of its ranks: views for a run of them, copies for indices [k]."""
        if isinstance(ranks, Tensor):
            ranks = ranks.to(self.down.device)
        return Stack(self.down[ranks], self.up[ranks])


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each stacked rank counts for each open row: γ · s · scale.

    Attributes:
        values: [open rows, K], float32, on the CPU.
    """

    values: Tensor
    _forms: dict[tuple[object, ...], tuple[Tensor | None, Tensor | None]] = field(
        default_factory=dict[tuple[object, ...], tuple[Tensor | None, Tensor | None]], repr=False
    )

    @classmethod
    def of(cls, coefficients: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> Sizes:
        """Spreads coefficients over stacked ranks.

        Args:
            coefficients: γ·s, [open rows, membranes].
            ranks: Rank of each membrane; they sum to K.
            scales: `alpha / rank` of each membrane.
        """
        values = coefficients.float().cpu() * torch.tensor(scales)
        if any(rank != 1 for rank in ranks):
            values = values.repeat_interleave(torch.tensor(ranks), dim=1)
        return cls(values)

    def form(self, h: Tensor, *, linear: bool) -> tuple[Tensor | None, Tensor | None]:
        """Returns the sizes shaped for projections `h` (None: all 1), and where they are 0 (None: nowhere).

        Kept, because all sites of a denoiser ask for the same few forms.
        """
        key = (linear, h.ndim, h.dtype, h.device)
        found = self._forms.get(key)
        if found is None:
            middle = (1,) * (h.ndim - 2)
            rows, ranks = self.values.shape
            shaped = self.values.view(rows, *middle, ranks) if linear else self.values.view(rows, ranks, *middle)
            shut = shaped == 0
            found = self._forms[key] = (
                shaped.to(h.device, h.dtype) if bool((shaped != 1).any()) else None,
                shut.to(h.device) if bool(shut.any()) else None,
            )
        return found


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


def stack(factors: Sequence[Factor]) -> Stack:
    """Stacks the factors of one site. A single factor is not copied, and neither are those that `pool` has joined.

    Args:
        factors: One per membrane, in the order of the coefficients' columns.
    """
    downs, ups = [f.down for f in factors], [f.up.flatten(1).T for f in factors]
    return Stack(_joined(downs), _joined(ups))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    base = parts[0]._base
    if base is not None and len(base) == sum(map(len, parts)):
        place = base.storage_offset()
        for part in parts:
            if part._base is not base or part.storage_offset() != place or not part.is_contiguous():
                break
            place += part.numel()
        else:
            return base
    return torch.cat(tuple(parts))


def pool(membranes: Sequence[Membrane]) -> list[Membrane]:
    """Returns the same membranes with their factors as views of one stack per site.

    Whoever keeps the membranes and stacks them, as an injection does, then holds their numbers once, not twice.
    """
    factors: list[dict[str, Factor]] = [{} for _ in membranes]
    for key in dict.fromkeys(key for membrane in membranes for key in membrane.factors):
        tensors = [(k, membrane.factors[key]) for k, membrane in enumerate(membranes) if key in membrane.factors]
        stacked = stack([factor for _, factor in tensors])
        start = 0
        for k, factor in tensors:
            ranks = slice(start, start + factor.rank)
            up = stacked.up[ranks].T
            factors[k][key] = Factor(
                stacked.down[ranks], up if factor.up.ndim == 2 else up[..., None, None], factor.alpha
            )
            start += factor.rank
    return [replace(membrane, factors=found) for membrane, found in zip(membranes, factors, strict=True)]


def project(module: Site, x: Tensor, down: Tensor) -> Tensor:
    """Computes `down x`: [rows, …, K] (Linear), or [rows, K, h, w] with the site's stride and padding (Conv2d)."""
    if isinstance(module, nn.Linear):
        return F.linear(x, down)
    if module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0) and x.is_contiguous():
        h = torch.bmm(down.flatten(1).expand(len(x), -1, -1), x.flatten(2))  # in bf16 three times as fast
        return h.view(len(x), len(down), *x.shape[2:])
    if module.padding_mode == "zeros":
        return F.conv2d(x, down, None, module.stride, module.padding, module.dilation)
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    return F.conv2d(padded, down, None, module.stride, 0, module.dilation)


def weighted(h: Tensor, sizes: Sizes, *, linear: bool) -> Tensor:
    """Multiplies projections by their sizes, in place where no gradient is needed; size 0 leaves a projection out."""
    values, shut = sizes.form(h, linear=linear)
    if values is not None:
        h = h * values if h.requires_grad else h.mul_(values)
    return h if shut is None else h.masked_fill(shut, 0)  # 0·inf is nan, and the row may be open for another membrane


def add_delta(module: Site, x: Tensor, y: Tensor, stacked: Stack, sizes: Sizes, rows: Rows) -> Tensor:
    """Adds the open membranes' output to `y`, in place where nothing needs a gradient.

    Rows that are closed are not touched at all, not even by adding zero: in fp16 a product with an infinite
    activation would make 0·inf = nan, and a closed row must stay the base model's bit for bit.

    Args:
        module: The site.
        x: The site's input, [rows, …].
        y: The base module's output for `x`.
        stacked: The open membranes.
        sizes: γ·s·scale of each open row and stacked rank.
        rows: Which rows are open.

    Returns:
        `y` plus the delta: `y` itself, or a new tensor under autograd.
    """
    linear = isinstance(module, nn.Linear)
    part = x if rows is None else x[rows]
    if part.dtype != y.dtype:
        part = part.to(y.dtype)
    h = weighted(project(module, part, stacked.down), sizes, linear=linear)
    if h.requires_grad or y.requires_grad:
        delta = F.linear(h, stacked.up.T) if linear else F.conv2d(h, stacked.up.T[..., None, None])
        if rows is None:
            return y + delta
        index = rows if isinstance(rows, Tensor) else torch.arange(len(y), device=y.device)[rows]
        return y.index_add(0, index, delta)
    if isinstance(rows, Tensor):
        delta = F.linear(h, stacked.up.T) if linear else F.conv2d(h, stacked.up.T[..., None, None])
        return y.index_add_(0, rows, delta)
    _accumulate(y if rows is None else y[rows], h, stacked.up, linear=linear)
    return y


def _accumulate(y: Tensor, h: Tensor, up: Tensor, *, linear: bool) -> None:
    """Adds `up h` into `y`: one matrix product that starts from `y`, where its layout allows that."""
    if linear and y.is_contiguous() and h.dtype == y.dtype:
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), up)
    elif linear:
        y.add_(F.linear(h, up.T))
    elif y.is_contiguous() and h.is_contiguous() and h.dtype == y.dtype:
        flat = up.T.expand(len(y), -1, -1)
        y.view(len(y), y.shape[1], -1).baddbmm_(flat, h.view(len(h), h.shape[1], -1))
    else:
        y.add_(F.conv2d(h, up.T[..., None, None]))


def merged_weight(weight: Tensor, stacked: Stack, sizes: Tensor) -> tuple[Tensor, float, float]:
    """Adds membranes to a site's weight: W + Σ_c γ_c · s_c · scale_c · up_c down_c, summed in float32 and rounded once.

    Args:
        weight: The site's own weight, [d_out, …]; it is not written to.
        stacked: The membranes.
        sizes: γ·s·scale of each stacked rank, [K]; a rank of size 0 is left out.

    Returns:
        The sum, in the weight's dtype (in float32 where that has fewer than 16 bits); ‖Δ‖² of the exact change Δ; and
        how much of that the rounded sum still holds, ⟨W' - W, Δ⟩, which is less where Δ is lost in the number format.
    """
    acts = sizes.ne(0).nonzero().flatten()
    chosen = stacked.choose(acts).to(sizes.to(weight.device))
    sizes = sizes[acts].to(weight.device)
    base = weight.detach().float()
    delta = ((chosen.up * sizes[:, None]).T @ chosen.down.flatten(1)).view(base.shape)
    merged = (base + delta).to(weight.dtype if weight.dtype.itemsize > 1 else torch.float32)
    change, flat = (merged.float() - base).flatten(), delta.flatten()
    return merged, float(torch.dot(flat, flat)), float(torch.dot(change, flat))


def run_with(module: Site, weight: Tensor, x: Tensor) -> Tensor:
    """Runs a site with another weight than its own."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, module.bias)
    return module._conv_forward(x, weight, module.bias)


def delta_norms(module: Site, x: Tensor, stacked: Stack, sizes: Sizes, ranks: Sequence[int]) -> Tensor:
    """Measures each membrane's own output.

    Args:
        module: The site.
        x: The site's input for the rows of `sizes`.
        stacked: The open membranes.
        sizes: γ·s·scale, [rows, K].
        ranks: Rank of each membrane; they sum to K.

    Returns:
        ‖γ s scale · up (down x)‖ per row and membrane, [rows, membranes], without forming any d_out-sized product.
    """
    h = weighted(project(module, x, stacked.down), sizes, linear=isinstance(module, nn.Linear)).float()
    h = h.flatten(2).transpose(1, 2) if isinstance(module, nn.Conv2d) else h.reshape(len(h), -1, h.shape[-1])
    up = stacked.up.float()
    if len(ranks) == len(up):  # all of rank 1
        return h.square().sum(dim=1).sqrt() * up.norm(dim=1)
    norms: list[Tensor] = []
    start = 0
    for rank in ranks:
        part, factor = h[..., start : start + rank], up[start : start + rank]
        norms.append(torch.einsum("btk,kl,btl->b", part, factor @ factor.T, part).clamp(min=0).sqrt())
        start += rank
    return torch.stack(norms, dim=1)
