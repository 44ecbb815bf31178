"""Arithmetic on membranes: sums, multiples, and the best membrane of a lower rank.

All functions are pure: they return new membranes. What was done is appended to `safegen.derived`, a JSON list in the
membrane's metadata, so that a training digest is never taken for that of the values at hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safegen.errors import BaseModelMismatchError, FormatError, ShapeMismatchError, UsageError
from safegen.membrane.weights import Factor, Membrane

DERIVED = "safegen.derived"


@dataclass(frozen=True, slots=True)
class Reranked:
    """A membrane of a lower rank.

    Attributes:
        membrane: The best approximation of that rank, at every site by itself.
        energy: ‖kept‖² / ‖all‖² of the products of all sites, in [0, 1]; 1 where there was nothing to keep.
        energies: The same by site.
    """

    membrane: Membrane
    energy: float
    energies: Mapping[str, float]


def add(membranes: Sequence[Membrane], *, concept: str) -> Membrane:
    """Returns the sum of membranes: at every site Σ scale · up · down, exactly, with the ranks added.

    Opened by one gate, all parts open together: whatever names one target opens them all. A policy with one rule per
    concept opens them one by one, and composes them just as exactly.

    Args:
        membranes: At least one, for the same base model.
        concept: Catalogue id of the sum.

    Returns:
        Targets of all; the parts' surrogate where they agree. float32 where their dtypes or scales differ. It has no
        calibration: until it is measured (`safegen calibrate`), it opens by words alone.

    Raises:
        UsageError: No membranes.
        BaseModelMismatchError: They are for different base models.
        ShapeMismatchError: At one site their shapes differ.
    """
    if not membranes:
        raise UsageError("no membranes to add; expected at least one")
    first = membranes[0]
    for other in membranes[1:]:
        if (other.base, other.architecture) != (first.base, first.architecture):
            raise BaseModelMismatchError(
                f"membranes {first.concept!r} and {other.concept!r} cannot be added: the one is for base "
                f"{first.base!r} ({first.architecture[:12]}), the other for {other.base!r} ({other.architecture[:12]})"
            )
    keys = sorted({key for membrane in membranes for key in membrane.factors})
    factors = {key: _sum(key, [m.factors[key] for m in membranes if key in m.factors]) for key in keys}
    surrogates = {membrane.surrogate for membrane in membranes}
    parts = [{"concept": m.concept, "surrogate": m.surrogate, "metadata": dict(m.metadata)} for m in membranes]
    return Membrane(
        concept=concept,
        targets=tuple(dict.fromkeys(target for membrane in membranes for target in membrane.targets)),
        base=first.base,
        architecture=first.architecture,
        factors=factors,
        surrogate=first.surrogate if len(surrogates) == 1 else "",
        metadata=_noted({}, {"op": "add", "of": parts}),
    )


def _sum(key: str, factors: Sequence[Factor]) -> Factor:
    shapes = {(f.down.shape[1:], f.up.shape[:1]) for f in factors}
    if len(shapes) > 1:
        found = ", ".join(f"down {list(f.down.shape)} up {list(f.up.shape)}" for f in factors)
        raise ShapeMismatchError(f"site {key!r}: the membranes to add have {found}; expected the same site in all")
    if len(factors) == 1:
        return factors[0]
    rank = sum(f.rank for f in factors)
    scales = {f.scale for f in factors}
    dtypes = {f.down.dtype for f in factors} | {f.up.dtype for f in factors}
    dtype = dtypes.pop() if len(dtypes) == 1 and len(scales) == 1 else torch.float32
    scale = scales.pop() if len(scales) == 1 else 1.0  # a factor has one scale: where they differ, it goes into up
    ups = [f.up.to(dtype) if f.scale == scale else (f.up.double() * (f.scale / scale)).to(dtype) for f in factors]
    return Factor(torch.cat([f.down.to(dtype) for f in factors]), torch.cat(ups, dim=1), scale * rank)


def scale(membrane: Membrane, factor: float) -> Membrane:
    """Returns a membrane whose product is `factor` times that of the given one; only alphas change.

    Args:
        membrane: What to scale.
        factor: A positive number. 0 would make a membrane that is trusted to erase and does nothing, and a negative one
            a membrane that teaches the concept: both are refused.

    Raises:
        UsageError: The factor is not a finite number above 0.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise UsageError(
            f"factor {factor}: expected a finite number above 0; at 0 the membrane would erase nothing, below 0 it "
            f"would draw {membrane.concept!r} into every image"
        )
    factors = {key: replace(f, alpha=f.alpha * factor) for key, f in membrane.factors.items()}
    return replace(
        membrane, factors=factors, metadata=_noted(membrane.metadata, {"op": "scale", "factor": float(factor)})
    )


def rerank(membrane: Membrane, rank: int) -> Reranked:
    """Returns the best membrane of at most `rank`, in the Frobenius norm of every site's product (Eckart-Young).

    The product [d_out, d_in·kh·kw] is never formed: its singular values are those of the [r, r] product of the
    triangular factors of `up` and `down`. Computed in float64, returned in float32 with scale 1.

    Args:
        membrane: What to approximate.
        rank: Highest rank that a site may have; sites of that rank or a lower one are kept as they are.

    Raises:
        UsageError: The rank is not positive.
    """
    found, kept, total = _reranked(membrane, rank)
    energies = {key: _share(kept[key], total[key]) for key in total}
    energy = _share(sum(kept.values()), sum(total.values()))
    step = {"op": "rerank", "rank": rank, "energy_kept": energy}
    return Reranked(replace(found, metadata=_noted(membrane.metadata, step)), energy, energies)


def distil(lora: Membrane, rank: int, *, layout: str, sha256: str) -> Reranked:
    """Returns a membrane of at most `rank` made of a LoRA file, with its origin and the energy kept in its metadata.

    Args:
        lora: The file's content.
        rank: As for `rerank`.
        layout: Layout of the file.
        sha256: Digest of the file.

    Raises:
        UsageError: The rank is not positive.
    """
    made = rerank(lora, rank)
    step = {"op": "distil", "rank": rank, "energy_kept": made.energy, "layout": layout, "sha256": sha256}
    return replace(made, membrane=replace(made.membrane, metadata=_noted(lora.metadata, step)))


def _reranked(membrane: Membrane, rank: int) -> tuple[Membrane, dict[str, float], dict[str, float]]:
    """Returns the membrane of lower rank, and by site the squared norms of what was kept and of all."""
    if rank < 1:
        raise UsageError(f"rank {rank}: expected a rank of at least 1")
    factors: dict[str, Factor] = {}
    kept: dict[str, float] = {}
    total: dict[str, float] = {}
    for key, factor in membrane.factors.items():
        basis_up, values, basis_down = _decomposed(factor)
        squares = values.square()
        total[key] = squares.sum().item()
        if factor.rank <= rank:
            factors[key], kept[key] = factor, total[key]
            continue
        kept[key] = squares[:rank].sum().item()
        roots = values[:rank].sqrt()
        factors[key] = _shaped(basis_up[:, :rank] * roots, roots[:, None] * basis_down[:rank], factor)
    return replace(membrane, factors=factors), kept, total


def _decomposed(factor: Factor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U [d_out, k], singular values [k] and Vᵀ [k, d_in·kh·kw] of scale · up · down, in float64."""
    q_up, r_up = torch.linalg.qr(factor.up.double().flatten(1))
    q_down, r_down = torch.linalg.qr(factor.down.double().flatten(1).T)
    u, values, vt = torch.linalg.svd(factor.scale * r_up @ r_down.T, full_matrices=False)
    return q_up @ u, values, vt @ q_down.T


def _shaped(up: Tensor, down: Tensor, like: Factor) -> Factor:
    rank = len(down)
    return Factor(
        down.float().reshape(rank, *like.down.shape[1:]).contiguous(),
        up.float().reshape(len(up), rank, *like.up.shape[2:]).contiguous(),
        float(rank),
    )


def _share(kept: float, total: float) -> float:
    return min(kept / total, 1.0) if total else 1.0


def _noted(metadata: Mapping[str, str], step: Mapping[str, object]) -> dict[str, str]:
    try:
        steps = json.loads(metadata.get(DERIVED, "[]"))
        if not isinstance(steps, list):
            raise ValueError("not a list")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"metadata {DERIVED!r} cannot be read ({error}); expected a JSON list of steps") from error
    return dict(metadata) | {DERIVED: json.dumps([*steps, dict(step)], ensure_ascii=False, sort_keys=True)}
