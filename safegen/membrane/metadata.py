"""What a membrane file says about itself: the reference code's fields, ModelSpec's, and safegen's own.

ModelSpec is https://github.com/Stability-AI/ModelSpec, version 1.0.1. All metadata of a safetensors file are strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from safegen.errors import FormatError
from safegen.membrane.weights import Factor, Membrane

FORMAT = "safegen.membrane/1"
ADAPTER = "lora_adapter_metadata"
SPEC = "modelspec.sai_model_spec"
SPEC_HASH = "modelspec.hash_sha256"

_OWN = ("concept", "targets", "base", "architecture", "surrogate")
# Said anew by every writer, from the membrane or the bytes: whatever a reader finds under them is not kept. The two
# sshs_ keys are digests that kohya's trainers take of the file they write.
_DERIVED = frozenset(
    ("format", "prompts", "rank", "alpha", "safegen.format", SPEC, SPEC_HASH, ADAPTER)
    + ("sshs_model_hash", "sshs_legacy_hash", *(f"safegen.{name}" for name in _OWN))
)
_MODEL_CLASSES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "mini": "safegen-mini",
}


def _spec_defaults(concept: str, base: str) -> dict[str, str]:
    """Returns what ModelSpec demands of a membrane whose own metadata do not say it."""
    defaults = {"modelspec.implementation": "diffusers", "modelspec.title": f"safegen membrane: {concept}"}
    if base:
        defaults["modelspec.architecture"] = f"{_MODEL_CLASSES.get(base, base)}/lora"
    return defaults


def described(membrane: Membrane) -> dict[str, str]:
    """Returns the metadata of a membrane's file, save for the hash and what belongs to one layout.

    `modelspec.*` is written where the architecture is known: from the base family, or as `membrane.metadata` states
    it. `modelspec.date`, `.license`, `.author` and so on are the caller's to put there; `modelspec.title`,
    `.architecture` and `.implementation` found there win over the defaults.

    Raises:
        FormatError: `membrane.metadata` holds a key that the writer fills in itself.
    """
    taken = sorted(_DERIVED & membrane.metadata.keys())
    if taken:
        raise FormatError(
            f"membrane {membrane.concept!r}: its metadata hold {', '.join(taken)}, which the writer fills in from the "
            "membrane; leave them out"
        )
    found = _spec_defaults(membrane.concept, membrane.base) | dict(membrane.metadata)
    spec = found if "modelspec.architecture" in found else dict(membrane.metadata)
    return spec | {
        **({SPEC: "1.0.1"} if "modelspec.architecture" in found else {}),
        "format": "pt",
        "prompts": ",".join(membrane.targets),  # the reference code's field; safegen.targets is the exact one
        "rank": str(max(f.rank for f in membrane.factors.values())),
        "alpha": str(max(f.alpha for f in membrane.factors.values())),
        "safegen.format": FORMAT,
        "safegen.concept": membrane.concept,
        "safegen.targets": json.dumps(list(membrane.targets), ensure_ascii=False),
        "safegen.base": membrane.base,
        "safegen.architecture": membrane.architecture,
        "safegen.surrogate": membrane.surrogate,
    }


def concept_of(metadata: Mapping[str, str]) -> str:
    """Returns the concept that a file's metadata name, or ""."""
    return metadata.get("safegen.concept", "") or metadata.get("prompts", "")


def membrane_of(
    factors: Mapping[str, Factor], metadata: Mapping[str, str], *, concept: str = "", targets: Sequence[str] = ()
) -> Membrane:
    """Makes a membrane of factors and a file's metadata.

    Args:
        factors: One factor per site, by file key.
        metadata: As found in the file.
        concept: What it erases, in place of what the file says.
        targets: Names it erases, likewise.

    Raises:
        FormatError: Metadata of another format version, metadata that cannot be read, or no concept named anywhere.
    """
    own = {name: metadata.get(f"safegen.{name}", "") for name in _OWN}
    found_format = metadata.get("safegen.format", FORMAT)
    if found_format != FORMAT:
        raise FormatError(f"format {found_format!r}; this version of safegen reads {FORMAT!r}")
    prompts = metadata.get("prompts", "")
    try:
        stated = tuple(_names(json.loads(own["targets"]))) if own["targets"] else (prompts,)
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"its metadata cannot be read ({error}); expected what write_membrane writes") from error
    name = concept or concept_of(metadata)
    if not name:
        raise FormatError(
            "it names no concept: neither safegen.concept nor prompts is in its metadata; say which concept it erases "
            "(concept=…, --concept …)"
        )
    return Membrane(
        concept=name,
        targets=tuple(targets) or stated,
        base=own["base"],
        architecture=own["architecture"],
        factors=factors,
        surrogate=own["surrogate"],
        metadata=_kept(metadata, name, own["base"]),
    )


def _names(value: object) -> list[str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise TypeError(f"safegen.targets is {value!r}, not a list of names")


def _kept(metadata: Mapping[str, str], concept: str, base: str) -> dict[str, str]:
    """Returns what of a file's metadata belongs to the membrane: all but what the writer would say by itself."""
    defaults = _spec_defaults(concept, base) if SPEC in metadata else {}
    return {k: v for k, v in metadata.items() if k not in _DERIVED and defaults.get(k) != v}
