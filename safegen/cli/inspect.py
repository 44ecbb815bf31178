"""`safegen inspect`: what is in a membrane file, and where it acts."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from safegen.cli import options
from safegen.cli.render import Column, Line, Sheet, show_facts, show_json, warn

if TYPE_CHECKING:
    from safegen.membrane.formats import Reading
    from safegen.membrane.weights import Factor, Membrane

EXAMPLE = "Example: safegen inspect membranes/mini/ghost/membrane.safetensors"

_UNNAMED = "unnamed"  # for a file that names no concept; never shown
_TOP = 5
_NOTHING = 1e-8  # norm below which a site changes nothing
_OUTLIER = 20.0  # times the median norm
_BLOCK = re.compile(r"lora_unet_((?:down_blocks|up_blocks)_\d+|mid_block)(?:_attentions_(\d+))?")


class SiteValues(TypedDict):
    """One site: the Frobenius norm of scale·up·down."""

    site: str
    block: str
    norm: float


class BlockValues(TypedDict):
    """The sites of one block of the denoiser; `norm` is that of all of them together, `share` of the squared total."""

    block: str
    sites: int
    norm: float
    share: float
    largest: str


def inspect(
    membrane: Annotated[
        Path, typer.Argument(metavar="MEMBRANE", help="A membrane or LoRA file, or the folder that holds a membrane.")
    ],
    base: options.Base = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a membrane file holds: where it comes from, and how strongly it acts in which block.

    Reads LoRA files of every layout that `safegen convert` reads; what they do in a text encoder is only counted.
    """
    from safegen.bundle.store import MEMBRANE_FILE
    from safegen.cli.host import load_base
    from safegen.membrane.formats import read_lora

    path = membrane / MEMBRANE_FILE if membrane.is_dir() else membrane
    host = load_base(base) if base else None
    reading = read_lora(path, text_encoder="drop", host=host.walk() if host else None)
    content = reading.membrane() if reading.concept else reading.membrane(concept=_UNNAMED, targets=[_UNNAMED])
    if host is not None:
        host.names(content)
    sites = [_site(key, factor) for key, factor in content.factors.items()]
    blocks = _blocks(sites)
    facts = _facts(content, reading)
    warnings = _warnings(sites, reading)
    if as_json:
        show_json(facts | {"blocks": blocks, "sites": sites, "warnings": warnings})
    else:
        _print_tables(facts, blocks, sites)
    for warning in warnings:
        warn(warning)


def _facts(membrane: Membrane, reading: Reading) -> dict[str, object]:
    from safegen.transport.calibration import parse

    return {
        "file": str(reading.path),
        "layout": str(reading.layout),
        "concept": membrane.concept if reading.concept else "",
        "targets": list(membrane.targets) if reading.concept else [],
        "surrogate": membrane.surrogate,
        "base": membrane.base,
        "architecture": membrane.architecture,
        "ranks": sorted({factor.rank for factor in membrane.factors.values()}),
        "site_count": len(membrane.factors),
        "parameters": membrane.parameter_count(),
        "bytes": reading.path.stat().st_size,
        "sha256": reading.sha256,
        "calibration": [asdict(one) for one in parse(membrane.metadata)],
        "training_digest": membrane.metadata.get("safegen.training_digest", ""),
        "derived": membrane.metadata.get("safegen.derived", ""),
    }


def _site(key: str, factor: Factor) -> SiteValues:
    """Measures a site without building its full matrix: ‖UD‖² is the sum of (UᵀU)∘(DDᵀ), and those are [r, r]."""
    down = factor.down.double().flatten(1)
    up = factor.up.double().flatten(1)
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).item()
    match = _BLOCK.match(key)
    block = "other"
    if match is not None:
        block = re.sub(r"_(\d+)$", r".\1", match[1]) + (f".attentions.{match[2]}" if match[2] else "")
    return {"site": key.removeprefix("lora_unet_"), "block": block, "norm": factor.scale * squared**0.5}


def _blocks(sites: Sequence[SiteValues]) -> list[BlockValues]:
    total = sum(site["norm"] ** 2 for site in sites)
    found: list[BlockValues] = []
    for block in dict.fromkeys(site["block"] for site in sites):
        inside = [site for site in sites if site["block"] == block]
        squared = sum(site["norm"] ** 2 for site in inside)
        found.append(
            {
                "block": block,
                "sites": len(inside),
                "norm": squared**0.5,
                "share": squared / total if total else 0.0,
                "largest": max(inside, key=lambda site: site["norm"])["site"],
            }
        )
    return found


def _warnings(sites: Sequence[SiteValues], reading: Reading) -> list[str]:
    found: list[str] = []
    if reading.dropped:
        found.append(f"{len(reading.dropped)} tensors of a text encoder are not shown; no membrane can hold them")
    acting = [site for site in sites if site["norm"] > _NOTHING]
    if not acting:
        return [*found, "this membrane changes nothing: the product of its factors is 0 at every site"]
    if len(acting) < len(sites):
        found.append(f"{len(sites) - len(acting)} of {len(sites)} sites change nothing")
    median = statistics.median(site["norm"] for site in acting)
    for site in acting:
        if site["norm"] > _OUTLIER * median:
            times = site["norm"] / median
            found.append(
                f"outlier: {site['site']} has norm {site['norm']:.4g}, {times:.0f} times the median of {median:.4g}"
            )
    return found


def _print_tables(facts: dict[str, object], blocks: Sequence[BlockValues], sites: Sequence[SiteValues]) -> None:
    show_facts(facts)
    columns = (Column("block", share=2), Column("sites", width=5), Column("norm", width=10), Column("share", width=6))
    Sheet((*columns, Column("largest site", share=5)), "Norm of scale·up·down by block").add(
        Line((b["block"], str(b["sites"]), f"{b['norm']:.4g}", f"{b['share']:.1%}", b["largest"])) for b in blocks
    )
    top = sorted(sites, key=lambda site: -site["norm"])[:_TOP]
    Sheet((Column("site", share=5), Column("norm", width=10)), "Sites that act most", widest=100).add(
        Line((site["site"], f"{site['norm']:.4g}")) for site in top
    )
