"""`safegen convert`: from any LoRA layout to a membrane file, or to the layout of PEFT and diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegen.cli import options
from safegen.cli.render import show_facts, show_json, warn
from safegen.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

    from safegen.cli.host import BaseModel
    from safegen.membrane.arithmetic import Reranked
    from safegen.membrane.formats import Reading
    from safegen.membrane.weights import Membrane

EXAMPLE = (
    "Examples: safegen convert membranes/mini/ghost ghost-lora.safetensors --to peft\n\n"
    "safegen convert lora.safetensors membrane.safetensors --to spm --rank 1 --concept van-gogh --base sd1"
)

_SUFFIX = ".safetensors"


class To(StrEnum):
    """Layouts that are written."""

    SPM = "spm"
    PEFT = "peft"


class TextEncoder(StrEnum):
    """What becomes of a text encoder's factors: the choices of `safegen.membrane.formats.TextEncoder`."""

    REFUSE = "refuse"
    DROP = "drop"


class Dtype(StrEnum):
    """Number formats of the factors."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Source = Annotated[
    Path, typer.Argument(metavar="IN", help="A LoRA or membrane file, or the folder that holds a membrane.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; nothing may be there.")]
ToLayout = Annotated[To, typer.Option("--to", help="spm: a membrane file (SPM / kohya). peft: PEFT and diffusers.")]
Rank = Annotated[
    int | None,
    typer.Option(min=1, help="Highest rank: sites of a higher one are approximated.", show_default="ranks stay"),
]
Concept = Annotated[
    str | None, typer.Option(help="Concept id: what the membrane erases.", show_default="what the file says")
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        help="Name that it erases; may be given several times.",
        show_default="what the file says, else the catalogue's names of the concept",
    ),
]
Text = Annotated[TextEncoder, typer.Option("--text-encoder", help="What to do with factors of a text encoder.")]
As = Annotated[
    Dtype | None, typer.Option("--dtype", help="Number format.", show_default="the file's, float32 after --rank")
]


def convert(
    source: Source,
    out: Out,
    to: ToLayout,
    rank: Rank = None,
    concept: Concept = None,
    target: Target = None,
    base: options.Base = None,
    text_encoder: Text = TextEncoder.REFUSE,
    dtype: As = None,
    as_json: options.AsJson = False,
) -> None:
    """Convert a LoRA file to a membrane, or a membrane to a LoRA that other tools open.

    Reads SPM / kohya, PEFT / diffusers, old diffusers and cloneofsimo files. A membrane that another tool opens as a
    LoRA is always on: it has no gate, and enforces nothing.
    """
    _check_out(out)
    from safegen.bundle.store import MEMBRANE_FILE
    from safegen.cli.host import load_base
    from safegen.membrane.formats import read_lora

    path = source / MEMBRANE_FILE if source.is_dir() else source
    host = load_base(base) if base else None
    reading = read_lora(path, text_encoder=text_encoder.value, host=host.walk() if host else None)
    if host is not None:  # keys of kohya's layout do not say what kind of denoiser they are for
        reading = replace(reading, component=host.component)
    names = _target_names(reading, concept, target or ())
    membrane = reading.membrane(concept=concept or "", targets=names)
    before, sites = _placed(membrane, reading, host, to)
    made = _reranked(before, reading, rank)
    membrane = made.membrane if made else before
    sha256 = _write(membrane, out, to, sites, reading, dtype)
    facts = _facts(reading, before, made, out, sha256)
    if as_json:
        show_json(facts | {"to": to.value, "energies": dict(made.energies) if made else {}})
    else:
        show_facts(facts)
    _warn(reading, membrane, to)


def _warn(reading: Reading, membrane: Membrane, to: To) -> None:
    if reading.dropped:
        warn(
            f"{len(reading.dropped)} tensors of the text encoder were left out: the result does less than the LoRA did"
        )
    if to is To.SPM and len({factor.alpha for factor in membrane.factors.values()}) > 1:
        warn("sites differ in alpha; safegen applies each, diffusers takes one for all: for it convert --to peft")
    if to is To.PEFT:
        warn("opened as a LoRA a membrane is always on: it has no gate, and enforces nothing")


def _check_out(out: Path) -> None:
    if out.suffix != _SUFFIX:
        raise UsageError(f"{out}: expected a file name that ends with {_SUFFIX}")
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: something is there already; choose another OUT, or move it away")
    options.check_folder(out.parent)


def _target_names(reading: Reading, concept: str | None, targets: Sequence[str]) -> Sequence[str]:
    """Returns the names to write: those given, none where the file has its own, or else the catalogue's."""
    if any(not target.strip() for target in targets):
        raise UsageError("--target: a name to erase is blank; expected a name")
    if targets or reading.concept or concept is None:
        return targets
    from safegen.policy.catalogue import load_catalogue

    catalogue = load_catalogue()
    found = catalogue.concepts.get(concept)
    if found is None:
        raise UsageError(
            f"--concept {concept}: the concept catalogue has none of that id, so its names are not known; give them "
            f"with --target.{did_you_mean(concept, catalogue.concepts)}"
        )
    return (found.name, *found.aliases)


def _placed(membrane: Membrane, reading: Reading, host: BaseModel | None, to: To) -> tuple[Membrane, Mapping[str, str]]:
    """Finds the sites of a membrane in its base model, where there is one or it is needed.

    Returns:
        The membrane, with its base noted where it was checked, and the site name of each key where it is known.
    """
    if host is None and to is To.PEFT and not reading.names:
        from safegen.cli.host import load_base, needs_no_folder

        if not needs_no_folder(membrane.base):
            raise UsageError(
                f"{reading.path}: its keys do not say where the names of modules end, and its base model is "
                f"{membrane.base or 'not stated'}; give the model that it was made for with --base"
            )
        host = load_base(membrane.base)
    if host is None:
        return membrane, reading.names
    names = host.names(membrane)
    return replace(membrane, base=host.family, architecture=host.sites.architecture), names


def _reranked(membrane: Membrane, reading: Reading, rank: int | None) -> Reranked | None:
    from safegen.membrane.arithmetic import distil

    return None if rank is None else distil(membrane, rank, layout=str(reading.layout), sha256=reading.sha256)


def _write(
    membrane: Membrane, out: Path, to: To, names: Mapping[str, str], reading: Reading, dtype: Dtype | None
) -> str:
    from safegen.membrane.file import write_membrane
    from safegen.membrane.formats import write_peft

    chosen = _dtype(membrane, dtype)
    if to is To.SPM:
        return write_membrane(membrane, out, dtype=chosen)
    return write_peft(membrane, out, names, dtype=chosen, component=reading.component)


def _dtype(membrane: Membrane, dtype: Dtype | None) -> torch.dtype:
    import torch

    if dtype is not None:
        return getattr(torch, dtype.value)
    found = {tensor.dtype for factor in membrane.factors.values() for tensor in (factor.down, factor.up)}
    return found.pop() if len(found) == 1 else torch.float32


def _facts(reading: Reading, before: Membrane, made: Reranked | None, out: Path, sha256: str) -> dict[str, object]:
    after = made.membrane if made else before
    return {
        "file": str(out),
        "layout_found": str(reading.layout),
        "concept": after.concept,
        "targets": list(after.targets),
        "base": after.base,
        "site_count": len(after.factors),
        "ranks_found": sorted({factor.rank for factor in before.factors.values()}),
        "ranks": sorted({factor.rank for factor in after.factors.values()}),
        "energy_kept": made.energy if made else 1.0,
        "dropped": len(reading.dropped),
        "parameters": after.parameter_count(),
        "bytes": out.stat().st_size,
        "sha256": sha256,
    }
