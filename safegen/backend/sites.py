"""Which modules of a denoiser carry membranes, and what they are called in a membrane file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from safegen.errors import BaseModelMismatchError, NoMatchingSiteError
from safegen.membrane.delta import Site, check_fits
from safegen.membrane.layouts import file_key
from safegen.membrane.weights import Membrane


@dataclass(frozen=True, slots=True)
class Sites:
    """The sites of one denoiser.

    Attributes:
        modules: Module of each site by its qualified name ("down_blocks.1.attentions.0.proj_in").
        architecture: Digest of all names and shapes: two models with the same digest take the same membranes.
    """

    modules: Mapping[str, Site]
    architecture: str

    def by_key(self) -> dict[str, str]:
        """Returns site names by file key (`lora_unet_…`).

        The map is made forwards: the key replaces every "." by "_", which cannot be undone by parsing.
        """
        return {file_key(name): name for name in self.modules}


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, Site]]:
    """Yields Linear and Conv2d modules below `module`, by isinstance; an adapter's own layers are not sites.

    A PEFT layer (a LoRA was loaded) stands in for the module it wraps: its `base_layer` is the site, under the name
    that the site has without the LoRA.
    """
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module) and hasattr(module, "lora_A"):
        yield from _walk(base, path)
        return
    if isinstance(module, nn.Linear | nn.Conv2d):
        if getattr(module, "groups", 1) == 1:  # a grouped convolution mixes too few channels to carry a factor
            yield path, module
        return
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name)


def find_sites(denoiser: nn.Module, blocks: type[nn.Module] | tuple[type[nn.Module], ...]) -> Sites:
    """Finds the sites of a denoiser: every Linear and Conv2d inside a transformer block (SPM, reference code).

    Args:
        denoiser: The model that predicts the noise.
        blocks: Class or classes of its transformer blocks; subclasses count.

    Raises:
        NoMatchingSiteError: There are none.
    """
    modules: dict[str, Site] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, blocks):
            modules |= dict(_walk(module, name))
    if not modules:
        names = " or ".join(block.__name__ for block in (blocks if isinstance(blocks, tuple) else (blocks,)))
        raise NoMatchingSiteError(
            f"{type(denoiser).__name__}: no Linear or Conv2d inside a {names} was found; expected at least "
            "one site. Membranes cannot guard this model."
        )
    lines = "\n".join(f"{name} {type_name(m)} {list(m.weight.shape)}" for name, m in sorted(modules.items()))
    return Sites(modules, hashlib.sha256(lines.encode()).hexdigest())


def type_name(module: Site) -> str:
    """Returns "Linear" or "Conv2d", whatever the subclass."""
    return "Linear" if isinstance(module, nn.Linear) else "Conv2d"


def plan(membrane: Membrane, sites: Sites, family: str) -> dict[str, str]:
    """Checks a membrane against a denoiser and returns the site name of each of its keys.

    Args:
        membrane: What is to be applied.
        sites: The denoiser's sites.
        family: The denoiser's base family, for the message.

    Raises:
        BaseModelMismatchError: Made for another base model.
        NoMatchingSiteError: Fewer sites match than the file holds.
        ShapeMismatchError: A factor does not fit its site.
    """
    other = membrane.architecture != sites.architecture if membrane.architecture else membrane.base not in ("", family)
    if other:
        raise BaseModelMismatchError(
            f"membrane {membrane.concept!r} was made for base {membrane.base!r} "
            f"(architecture {membrane.architecture[:12] or 'not stated'}), this model is {family!r} "
            f"({sites.architecture[:12]}); use the membrane of {membrane.concept!r} for {family!r}, or train one"
        )
    names = sites.by_key()
    missing = [key for key in membrane.factors if key not in names]
    if missing:
        found = len(membrane.factors) - len(missing)
        made_for = f"base {membrane.base!r}" if membrane.base else "another base model, which it does not name"
        raise NoMatchingSiteError(
            f"membrane {membrane.concept!r} holds {len(membrane.factors)} sites, {found} of them are in this model "
            f"({family!r}, {len(names)} sites); the first one missing is {missing[0]!r}. It was made for {made_for}."
        )
    for key, factor in membrane.factors.items():
        name = names[key]
        check_fits(name, sites.modules[name], factor)
    return {key: names[key] for key in membrane.factors}
