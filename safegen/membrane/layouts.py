"""How other tools name the tensors of a LoRA: which layout a file has, and which site and factor each key means.

A key either belongs to exactly one layout or is refused; nothing is skipped. Site names are never rebuilt from keys
whose dots were replaced: those are matched forwards, against the sites of a model (`safegen.backend.sites`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from torch import Tensor

from safegen.errors import FormatError
from safegen.membrane.weights import Factor

Part = Literal["down", "up", "alpha"]


class Layout(StrEnum):
    """How a file names its tensors.

    Attributes:
        SPM: `lora_unet_<site>.lora_down.weight`: SPM, kohya's trainers, safegen.
        PEFT: `unet.<path>.lora_A.weight`: PEFT, and diffusers since 0.22.
        OLD_DIFFUSERS: `<path>.processor.to_q_lora.down.weight` or `<path>.to_q.lora.down.weight`: diffusers before.
        CLONEOFSIMO: `unet:<number>:down`, in the order of a walk over the host: cloneofsimo's lora.
    """

    SPM = "spm"
    PEFT = "peft"
    OLD_DIFFUSERS = "old-diffusers"
    CLONEOFSIMO = "cloneofsimo"


@dataclass(frozen=True, slots=True)
class Place:
    """What one key means.

    Attributes:
        layout: Its layout; None for `<path>.alpha`, which both dotted layouts have.
        prefix: What stands before the site ("unet.", "lora_te_", "").
        site: The site as the layout writes it: a file key, a dotted path, or a number.
        part: Which of the site's tensors.
    """

    layout: Layout | None
    prefix: str
    site: str
    part: Part

    @property
    def text(self) -> bool:
        """Whether it belongs to a text encoder."""
        return self.prefix.removeprefix("base_model.model.").startswith(("text_encoder", "lora_te"))


_PATH = r"(?P<prefix>(?:base_model\.model\.)?(?:(?:unet|transformer|text_encoder(?:_[23])?)\.)?)(?P<site>\w+(?:\.\w+)*)"
_PATTERNS: tuple[tuple[Layout | None, re.Pattern[str]], ...] = tuple(
    (layout, re.compile(pattern, re.ASCII))
    for layout, pattern in (
        (
            Layout.SPM,
            r"(?P<prefix>lora_(?:unet|te\d?)_)(?P<site>\w+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)",
        ),
        (Layout.PEFT, _PATH + r"\.(?P<part>lora_[AB])\.weight"),
        (Layout.OLD_DIFFUSERS, _PATH + r"\.(?P<name>to_[qkv]|to_out)_lora\.(?P<part>down|up)\.weight"),
        # What diffusers' own converter calls the alpha of such a pair ("network alphas"):
        (Layout.OLD_DIFFUSERS, _PATH + r"\.(?P<name>to_[qkv]|to_out)_lora(?:\.down\.weight)?\.(?P<part>alpha)"),
        (Layout.OLD_DIFFUSERS, _PATH + r"\.lora(?:_linear_layer)?\.(?P<part>down|up)\.weight"),
        (Layout.CLONEOFSIMO, r"(?P<prefix>(?:unet|text_encoder):)(?P<site>0|[1-9]\d{0,3}):(?P<part>up|down)"),
        (None, _PATH + r"\.(?P<part>alpha)"),
    )
)
_PARTS: Mapping[str, Part] = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "down": "down",
    "up": "up",
    "alpha": "alpha",
}
_MAX_KEY = 300

# What an unknown key most likely is: adapters that are no product of two factors.
_FOREIGN = {
    "dora_scale": "DoRA, which rescales the base weights",
    "lora_magnitude_vector": "DoRA, which rescales the base weights",
    "hada_": "LoHa, a Hadamard product",
    "lokr_": "LoKr, a Kronecker product",
    "lora_mid": "a Tucker decomposition with three factors",
    ".bias": "a bias",
    "diffusion_model.": "a file for another implementation of the model",
}


def file_key(name: str) -> str:
    """Returns the key of a site in a membrane file."""
    return "lora_unet_" + name.replace(".", "_")


def classify(key: str) -> Place | None:
    """Returns what a key means; None for a key of no known layout."""
    if len(key) > _MAX_KEY:
        return None
    for layout, pattern in _PATTERNS:
        match = pattern.fullmatch(key)
        if match is None:
            continue
        found = match.groupdict()
        site = found["site"]
        if layout is Layout.SPM:
            site = found["prefix"] + site
        elif layout is Layout.OLD_DIFFUSERS:
            name = {"to_out": "to_out.0"}.get(found.get("name") or "", found.get("name"))
            site = site.removesuffix(".processor") + (f".{name}" if name else "")
        return Place(layout, found["prefix"], site, _PARTS[found["part"]])
    return None


def classify_all(keys: Iterable[str]) -> dict[str, Place]:
    """Returns what every key means.

    Raises:
        FormatError: Names the first key of no known layout.
    """
    places: dict[str, Place] = {}
    for key in keys:
        place = classify(key)
        if place is None:
            what = next((f": {text}" for part, text in _FOREIGN.items() if part in key), "")
            raise FormatError(
                f"tensor {key[:_MAX_KEY]!r} is of no layout that safegen reads{what}; expected keys of SPM / kohya, "
                "PEFT, old diffusers or cloneofsimo, and nothing else"
            )
        places[key] = place
    return places


def detect_layout(keys: Iterable[str]) -> Layout:
    """Tells which layout a file has.

    Args:
        keys: Names of its tensors.

    Raises:
        FormatError: A key of no known layout, keys of several layouts or for several models, or none that tell.
    """
    return layout_of(classify_all(keys))


def layout_of(places: Mapping[str, Place]) -> Layout:
    """Returns the one layout of classified keys.

    Raises:
        FormatError: As for `detect_layout`.
    """
    seen: dict[Layout, str] = {}
    prefixes: dict[str, str] = {}
    for key, place in places.items():
        if place.layout is not None:
            seen.setdefault(place.layout, key)
        if not place.text:
            prefixes.setdefault(place.prefix, key)
    if not seen:
        raise FormatError("no factors in the file; expected one pair per site")
    for kind, found in (("layouts", seen), ("prefixes", prefixes)):
        if len(found) > 1:
            (first, one), (second, other), *_ = found.items()
            raise FormatError(
                f"mixed {kind}: tensor {one!r} is {str(first)!r}, tensor {other!r} is {str(second)!r}; expected one of "
                "them throughout"
            )
    return next(iter(seen))


def group(places: Mapping[str, Place]) -> dict[str, dict[Part, str]]:
    """Groups tensors by site.

    Args:
        places: Of the tensors to group; those of a text encoder have been taken out.

    Returns:
        Keys by part by file key (by number, for cloneofsimo's order).

    Raises:
        FormatError: Two keys mean the same tensor, or two paths the same site.
    """
    grouped: dict[str, dict[Part, str]] = {}
    paths: dict[str, tuple[str, str]] = {}
    for key, place in places.items():
        site = file_key(place.site) if place.layout in (None, Layout.PEFT, Layout.OLD_DIFFUSERS) else place.site
        parts = grouped.setdefault(site, {})
        path, first = paths.setdefault(site, (place.site, key))
        other = parts.get(place.part) or (first if path != place.site else None)
        if other is not None:
            raise FormatError(f"tensors {other!r} and {key!r} both name site {site!r}; expected each tensor once")
        parts[place.part] = key
    return grouped


def assemble(
    tensors: Mapping[str, Tensor],
    grouped: Mapping[str, Mapping[Part, str]],
    alphas: Mapping[str, float] | None = None,
) -> dict[str, Factor]:
    """Builds the factor of every site.

    Args:
        tensors: By key.
        grouped: Keys by part and site.
        alphas: Alpha of each site where the file states it in its metadata; else the tensor counts, or the rank.

    Returns:
        Factors by site, in alphabetical order.

    Raises:
        FormatError: A site lacks a factor, or its alpha is not one positive number.
        ShapeMismatchError: Factors that do not fit each other.
    """
    factors: dict[str, Factor] = {}
    for site, parts in sorted(grouped.items()):
        missing = [part for part in ("down", "up") if part not in parts]
        if missing:
            raise FormatError(f"site {site!r} lacks its {' and its '.join(missing)} factor")
        down, up = tensors[parts["down"]], tensors[parts["up"]]
        alpha = tensors[parts["alpha"]] if "alpha" in parts else None
        if alpha is not None and alpha.numel() != 1:
            raise FormatError(f"site {site!r}: alpha has shape {list(alpha.shape)}; expected a single number")
        if alphas is not None:
            value = alphas[site]
        else:
            value = float(alpha.item()) if alpha is not None else float(down.shape[0] if down.ndim else 0)
        factors[site] = Factor(down, up, value)
    if not factors:
        raise FormatError("no factors in the file; expected one pair per site")
    return factors
