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
from safegen.cli.render import Column, Line, Sheet, show, show_json, warn

if TYPE_CHECKING:
    from safegen.membrane.weights import Factor, Membrane

EXAMPLE = "Example: safegen inspect membranes/mini/ghost/membrane.safetensors"

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
    membrane: Annotated[Path, typer.Argument(metavar="MEMBRANE", help="A membrane file, or the folder that holds it.")],
    as_json: options.AsJson = False,
) -> None:
    """Show what a membrane file holds: where it comes from, and how strongly it acts in which block."""
    from safegen.bundle.store import MEMBRANE_FILE
    from safegen.membrane.file import file_digest, read_membrane

    path = membrane / MEMBRANE_FILE if membrane.is_dir() else membrane
    content = read_membrane(path)
    sites = [_site(key, factor) for key, factor in content.factors.items()]
    blocks = _blocks(sites)
    facts = _facts(content, path, file_digest(path))
    warnings = _warnings(sites)
    if as_json:
        show_json(facts | {"blocks": blocks, "sites": sites, "warnings": warnings})
    else:
        _print_tables(facts, blocks, sites)
    for warning in warnings:
        warn(warning)


def _facts(membrane: Membrane, path: Path, digest: str) -> dict[str, object]:
    from safegen.transport.calibration import parse

    return {
        "file": str(path),
        "concept": membrane.concept,
        "targets": list(membrane.targets),
        "surrogate": membrane.surrogate,
        "base": membrane.base,
        "architecture": membrane.architecture,
        "ranks": sorted({factor.rank for factor in membrane.factors.values()}),
        "site_count": len(membrane.factors),
        "parameters": membrane.parameter_count(),
        "bytes": path.stat().st_size,
        "sha256": digest,
        "calibration": [asdict(one) for one in parse(membrane.metadata)],
        "training_digest": membrane.metadata.get("safegen.training_digest", ""),
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


def _warnings(sites: Sequence[SiteValues]) -> list[str]:
    acting = [site for site in sites if site["norm"] > _NOTHING]
    if not acting:
        return ["this membrane changes nothing: the product of its factors is 0 at every site"]
    found: list[str] = []
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


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {part}" for name, part in value.items())
    return str(value)


def _print_tables(facts: dict[str, object], blocks: Sequence[BlockValues], sites: Sequence[SiteValues]) -> None:
    for name, value in facts.items():
        items: Sequence[object] = value if isinstance(value, list) else [value]
        text = ", ".join(_shown(item) for item in items)
        show(f"{name.replace('_', ' '):<16} {text or '-'}")
    columns = (Column("block", share=2), Column("sites", width=5), Column("norm", width=10), Column("share", width=6))
    Sheet((*columns, Column("largest site", share=5)), "Norm of scale·up·down by block").add(
        Line((b["block"], str(b["sites"]), f"{b['norm']:.4g}", f"{b['share']:.1%}", b["largest"])) for b in blocks
    )
    top = sorted(sites, key=lambda site: -site["norm"])[:_TOP]
    Sheet((Column("site", share=5), Column("norm", width=10)), "Sites that act most", widest=100).add(
        Line((site["site"], f"{site['norm']:.4g}")) for site in top
    )
