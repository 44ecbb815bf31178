"""LoRA files of every layout that safegen reads, and the two that it writes.

Reading is strict: a tensor or a setting that is not understood is an error, never left out. What a LoRA does beside the
product of two factors in the denoiser (text encoder, DoRA, LoHa, biases) has no place in a membrane.

A membrane in a LoRA file that another tool opens is always on: it has no gate, and enforces nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from safegen.errors import FormatError
from safegen.membrane.adapter import adapter_metadata, alphas_of, settings_for
from safegen.membrane.file import DTYPES, MAX_HEADER_BYTES, located, no_duplicates, read_container, write_container
from safegen.membrane.layouts import Layout, Place, assemble, classify_all, file_key, group, layout_of
from safegen.membrane.metadata import ADAPTER, concept_of, described, membrane_of
from safegen.membrane.order import Host, by_file_key, classes_of, place_in_order
from safegen.membrane.weights import Factor, Membrane

MAX_LORA_BYTES = 1 << 30
"""Largest file that is converted: a LoRA of rank 128 for the whole U-Net has 150 MB, a membrane under 2."""

TextEncoder = Literal["refuse", "drop"]
Component = Literal["unet", "transformer"]

_ALPHA_DTYPES = DTYPES | {"F64", "I64", "I32"}  # diffusers' own conversion to kohya's layout writes integers
_PEFT_FOLDER = "base_model.model."
_EMBEDDING = "<embed>"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a LoRA file holds.

    Attributes:
        path: The file.
        layout: Its layout.
        sha256: Digest of its bytes.
        factors: One factor per site, keyed as in a membrane file (`lora_unet_…`).
        names: Qualified site name of each key, where the layout says it; empty for SPM / kohya.
        component: What the factors belong to.
        metadata: The file's metadata, without those that only say how to read the tensors.
        dropped: Names of the text encoder's tensors, which the caller said to leave out.
    """

    path: Path
    layout: Layout
    sha256: str
    factors: Mapping[str, Factor]
    names: Mapping[str, str]
    component: Component
    metadata: Mapping[str, str]
    dropped: tuple[str, ...]

    @property
    def concept(self) -> str:
        """The concept that the file names, or ""."""
        return concept_of(self.metadata)

    def membrane(self, *, concept: str = "", targets: Sequence[str] = ()) -> Membrane:
        """Returns the content as a membrane, its values checked.

        Args:
            concept: What it erases, in place of what the file says; needed where the file says nothing.
            targets: The names it erases, likewise.

        Raises:
            FormatError: No concept or no name is known, metadata that cannot be read, NaN, infinity or huge norms.
        """
        with located(self.path):
            membrane = membrane_of(self.factors, self.metadata, concept=concept, targets=targets)
            membrane.check_values()
        return membrane


@dataclass(frozen=True, slots=True)
class _Plan:
    layout: Layout
    places: Mapping[str, Place]
    dropped: tuple[str, ...]


def read_lora(path: Path, *, text_encoder: TextEncoder = "refuse", host: Host | None = None) -> Reading:
    """Reads a LoRA file of any layout that safegen knows.

    Args:
        path: A `.safetensors` file.
        text_encoder: What to do with factors of a text encoder: "refuse" the file, or "drop" them. Dropping changes
            what the LoRA does.
        host: The model it was made for; needed for cloneofsimo's order, which numbers sites.

    Returns:
        The content, on the CPU, in the file's dtype.

    Raises:
        MembraneNotFoundError: No such file.
        FormatError: Damaged, hostile, of no known or of mixed layout, or more than a plain LoRA of the denoiser.
        ShapeMismatchError: Factors that do not fit each other, or the host.
        NoMatchingSiteError: Numbered sites that are not the host's.
    """

    def check(keys: Sequence[str], metadata: Mapping[str, str]) -> _Plan:
        return _plan(keys, metadata, text_encoder)

    container, plan = read_container(path, limit=MAX_LORA_BYTES, check=check, alphas=_ALPHA_DTYPES)
    with located(path):
        metadata = dict(container.metadata)
        if plan.layout is Layout.CLONEOFSIMO:
            factors, names = _ordered(container.tensors, plan, metadata, host)
        else:
            grouped = group(plan.places)
            alphas = _alphas(container.tensors, plan, metadata, path)
            factors = assemble(container.tensors, grouped, alphas)
            places = plan.places.values()
            names = {} if plan.layout is Layout.SPM else {file_key(p.site): p.site for p in places}
    prefix = next(iter(plan.places.values())).prefix.removeprefix(_PEFT_FOLDER)
    component: Component = "transformer" if prefix == "transformer." else "unet"
    return Reading(path, plan.layout, container.sha256, factors, names, component, metadata, plan.dropped)


def _plan(keys: Sequence[str], metadata: Mapping[str, str], text_encoder: TextEncoder) -> _Plan:
    """Decides what every tensor of a file is, from the names alone."""
    embeddings = [key for key in keys if metadata.get(key) == _EMBEDDING]  # textual inversion, in cloneofsimo's files
    places = classify_all(key for key in keys if key not in set(embeddings))
    layout = layout_of(places)
    dropped = (*(key for key, place in places.items() if place.text), *embeddings)
    if dropped and text_encoder == "refuse":
        raise FormatError(
            f"{len(dropped)} of {len(keys)} tensors belong to a text encoder, the first is {dropped[0][:300]!r}; a "
            "membrane acts in the denoiser only. Say that they may be left out (text_encoder='drop', --text-encoder "
            "drop): the result does less than the LoRA did"
        )
    kept = {key: place for key, place in places.items() if not place.text}
    if not kept:
        raise FormatError("all factors belong to a text encoder; expected some of the denoiser's")
    return _Plan(layout, kept, dropped)


def _ordered(
    tensors: Mapping[str, Tensor], plan: _Plan, metadata: dict[str, str], host: Host | None
) -> tuple[dict[str, Factor], dict[str, str]]:
    if host is None:
        raise FormatError(
            "its tensors are numbered in cloneofsimo's order; which sites the numbers mean only the model that it was "
            "made for can say: give the host (--base)"
        )
    component = next(iter(plan.places.values())).prefix.removesuffix(":")
    factors = assemble(tensors, group(plan.places))
    for number, factor in factors.items():
        stated = metadata.pop(f"{component}:{number}:rank", None)
        if stated != str(factor.rank):
            raise FormatError(f"metadata state rank {stated} for number {number}; its tensors have rank {factor.rank}")
    placed = place_in_order(factors, classes_of(metadata, component), host)
    for key in (component, *(k for k in metadata if k in plan.dropped or k.split(":")[0] == "text_encoder")):
        metadata.pop(key, None)
    return by_file_key(factors, placed)


def _alphas(
    tensors: Mapping[str, Tensor], plan: _Plan, metadata: dict[str, str], path: Path
) -> dict[str, float] | None:
    """Returns the alphas that stand beside the tensors, by file key; None where there are none."""
    text: str | bytes | None = metadata.pop(ADAPTER, None)
    downs = {place.site: key for key, place in plan.places.items() if place.part == "down"}
    prefix = next(iter(plan.places.values())).prefix
    stated = any(place.part == "alpha" for place in plan.places.values())
    if text is None and prefix.startswith(_PEFT_FOLDER) and not stated:
        text = _adapter_config(path)
        prefix = ""
    if text is None:
        return None
    if stated or plan.layout is not Layout.PEFT:
        raise FormatError(
            f"alphas are stated twice, or for another layout: metadata {ADAPTER!r} goes with the PEFT layout without "
            "alpha tensors"
        )
    try:
        found = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"LoRA settings are not JSON ({error})") from error
    ranks = {site: tensors[key].shape[0] if tensors[key].ndim else 0 for site, key in downs.items()}
    alphas = alphas_of(settings_for(found, prefix.removeprefix(_PEFT_FOLDER)), ranks)
    return {file_key(site): alpha for site, alpha in alphas.items()}


def _adapter_config(path: Path) -> bytes:
    beside = path.with_name("adapter_config.json")
    if not beside.is_file() or beside.stat().st_size > MAX_HEADER_BYTES:
        raise FormatError(
            f"its keys are those of PeftModel.save_pretrained, which states alpha in {beside.name}; expected that file "
            f"beside it, with at most {MAX_HEADER_BYTES} bytes"
        )
    return beside.read_bytes()


def write_peft(
    membrane: Membrane,
    path: str | Path,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float32,
    component: Component = "unet",
) -> str:
    """Writes a membrane in the PEFT layout, which diffusers and PEFT open as a LoRA; atomically, and deterministic.

    Per site `<component>.<path>.lora_A.weight` (down) and `.lora_B.weight` (up). Alphas stand in
    `lora_adapter_metadata`: opened in diffusers, every site acts with its own `alpha / rank`.

    Args:
        membrane: What to write; its values are checked first.
        path: Where to; folders are made.
        names: Qualified site name of each of its keys: from `safegen.backend.sites.plan`, or a `Reading`.
        dtype: float32, float16 or bfloat16.
        component: The pipeline's part that the sites belong to.

    Returns:
        The sha256 of the file, in hex.

    Raises:
        FormatError: A key without a name or with one that is not its own; values or sizes that no reader accepts.
    """
    membrane.check_values()
    wrong = [key for key in membrane.factors if key not in names or file_key(names[key]) != key]
    if wrong:
        raise FormatError(
            f"site {wrong[0]!r}: its name in the model is {names.get(wrong[0], 'not known')!r}; expected the names of "
            "all sites. Give the model that the membrane was made for"
        )
    factors = {names[key]: factor for key, factor in membrane.factors.items()}
    tensors = {
        f"{component}.{name}.{part}.weight": tensor.detach().to("cpu", dtype).contiguous()
        for name, factor in factors.items()
        for part, tensor in (("lora_A", factor.down), ("lora_B", factor.up))
    }
    metadata = described(membrane) | {ADAPTER: adapter_metadata(factors, f"{component}.")}
    return write_container(tensors, metadata, Path(path), limit=MAX_LORA_BYTES)
