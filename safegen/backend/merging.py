"""Static composition: sites run with weights into which the membranes are merged.

The host's own weights are never written to. The merged ones lie beside them and run in their place, so that taking a
policy off restores every bit, and what a host does to its weights (casts, a fused LoRA, another state dict, saving)
meets exactly what it would meet without a policy (docs/decisions/0013).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safegen.errors import AttestationError, UnsupportedBackendError
from safegen.membrane.delta import Site, run_with

if TYPE_CHECKING:
    from safegen.backend.attachment import SiteAttachment

Checksum = tuple[torch.dtype, int]
"""What tells a weight from others."""

_LEAST_KEPT = 0.9  # of the membranes' change; below it a number format is too coarse for them


@dataclass(slots=True)
class Merged:
    """A site's weight with membranes merged in, in use in place of the site's own.

    Attributes:
        module: The site.
        weight: The merged weight.
        asked: ‖Δ‖² of the exact change.
        kept: How much of that the merged weight holds.
        made_of: Checksum of the site's own weight that it was made of.
    """

    module: Site
    weight: Tensor
    asked: float
    kept: float
    made_of: Checksum

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the site with the merged weight, which follows the input's device and dtype."""
        weight = self.weight
        if weight.dtype != x.dtype or weight.device != x.device:
            weight = self.weight = weight.to(x.device, x.dtype)
        return run_with(self.module, weight, x)

    def on(self, module: Site) -> Merged:
        """Returns the same for a copy of the site."""
        return replace(self, module=module)


def merge(sites: Collection[SiteAttachment], sizes: Tensor) -> None:
    """Merges membranes into copies of the sites' weights, which run in their place from then on.

    Args:
        sites: The sites.
        sizes: γ·s of each membrane, [membranes].

    Raises:
        UnsupportedBackendError: A site does not run its weight by itself, so that no other can take its place.
        AttestationError: The weights' number format is too coarse for the membranes.
    """
    for site in sites:
        _refuse_other_forward(site)
    _put({site: site.merge(sizes, one) for site, one in _made_of(sites)}, sites)


def renew(sites: Collection[SiteAttachment], sizes: Tensor) -> None:
    """Merges again where the host has changed a site's weight since: fused a LoRA, loaded a state dict, cast the model.

    Raises:
        AttestationError: The weights' number format is too coarse for the membranes.
    """
    held = [site for site in sites if not site.module.weight.is_meta]  # an offloading hook keeps the others elsewhere
    changed = [(site, one) for site, one in _made_of(held) if site.merged is None or site.merged.made_of != one]
    if changed:
        _put({site: site.merge(sizes, one) for site, one in changed}, sites)


def _made_of(sites: Collection[SiteAttachment]) -> list[tuple[SiteAttachment, Checksum]]:
    return list(zip(sites, checksums([site.module.weight for site in sites]), strict=True))


def _put(new: Mapping[SiteAttachment, Merged], sites: Collection[SiteAttachment]) -> None:
    """Puts merged weights in place, all or, where they do not hold the membranes, none of them."""
    _refuse_loss([merged for site in sites if (merged := new.get(site, site.merged)) is not None])
    for site, merged in new.items():
        site.merged = merged


def checksums(weights: Sequence[Tensor]) -> list[Checksum]:
    """Returns the dtype of each weight and the sum of its bytes, read as whole numbers: a change of any value shows."""
    found = [_sum_of_bits(weight.detach()) for weight in weights]
    values = torch.stack([one.to(found[0].device) for one in found]).tolist() if found else []
    return [(weight.dtype, value) for weight, value in zip(weights, values, strict=True)]


def _sum_of_bits(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    size = flat.element_size()
    even = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    whole = torch.int64 if even else {1: torch.int8, 2: torch.int16, 4: torch.int32}[size]  # the widest is the fastest
    return flat.view(whole).sum()


def _refuse_other_forward(site: SiteAttachment) -> None:
    module = site.module
    plain = type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
    if not plain or site.over_hook:
        found = "a hook that was installed before the policy" if plain else f"{type(module).__name__}'s own forward"
        raise UnsupportedBackendError(
            f"site {site.name} cannot run with a merged weight: expected a plain Linear or Conv2d on its own weight, "
            f"found {found}. Apply the policy before what installs it (offload, casting, quantisation), or with "
            'composition="runtime".'
        )


def _refuse_loss(found: Collection[Merged]) -> None:
    asked, kept = sum(merged.asked for merged in found), sum(merged.kept for merged in found)
    if not (math.isfinite(kept) and kept >= _LEAST_KEPT * asked):
        dtypes = ", ".join(sorted({str(merged.weight.dtype)[6:] for merged in found}))
        raise AttestationError(
            f"merged into weights of {dtypes}, {kept / asked:.0%} of what the membranes change would be kept; expected "
            f'at least {_LEAST_KEPT:.0%}. Apply the policy with composition="runtime", which adds to outputs instead.'
        )
