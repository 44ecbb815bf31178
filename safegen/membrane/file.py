"""Membrane files: safetensors in the SPM / kohya layout, with safegen's metadata.

Per site three tensors, `lora_unet_<path with "_" for ".">.lora_down.weight`, `.lora_up.weight` and `.alpha`, as the
reference code of SPM and kohya's LoRA trainers write them; stock diffusers opens the file as a LoRA (without a gate).
A file is checked before a tensor of it is built: what the safetensors library accepts is wider than what a membrane is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from safegen.errors import FormatError, MembraneError, MembraneNotFoundError
from safegen.membrane.weights import Factor, Membrane

FORMAT = "safegen.membrane/1"
MAX_FILE_BYTES = 64 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
DTYPES = {"F32", "F16", "BF16"}

_KEY = re.compile(r"(lora_unet_[A-Za-z0-9_]{1,240})\.(lora_down\.weight|lora_up\.weight|alpha)")
_OWN = ("concept", "targets", "base", "architecture", "surrogate")
_WRITTEN = {"format", "prompts", "rank", "alpha", "safegen.format", *(f"safegen.{name}" for name in _OWN)}


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_membrane(membrane: Membrane, path: str | Path, *, dtype: torch.dtype = torch.float32) -> str:
    """Writes a membrane, atomically.

    Args:
        membrane: What to write; its values are checked first.
        path: Where to; folders are made.
        dtype: float32, float16 or bfloat16, for the factors (alpha stays float32).

    Returns:
        The sha256 of the file, in hex.

    Raises:
        FormatError: Values that no reader would accept (NaN, infinity, huge norms).
    """
    membrane.check_values()
    tensors = {
        name: (tensor if name.endswith(".alpha") else tensor.detach().to("cpu", dtype)).contiguous()
        for name, tensor in membrane.tensors()
    }
    ranks = sorted({f.rank for f in membrane.factors.values()})
    metadata = dict(membrane.metadata) | {
        "format": "pt",
        "prompts": ",".join(membrane.targets),  # the reference code's field; safegen.targets is the exact one
        "rank": str(ranks[-1]),
        "alpha": str(max(f.alpha for f in membrane.factors.values())),
        "safegen.format": FORMAT,
        "safegen.concept": membrane.concept,
        "safegen.targets": json.dumps(list(membrane.targets), ensure_ascii=False),
        "safegen.base": membrane.base,
        "safegen.architecture": membrane.architecture,
        "safegen.surrogate": membrane.surrogate,
    }
    content = save(tensors, metadata)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    temporary.replace(path)
    return hashlib.sha256(content).hexdigest()


def read_membrane(path: Path) -> Membrane:
    """Reads a membrane file.

    Args:
        path: A `.safetensors` file in the SPM / kohya layout, with or without safegen's metadata. Without it, the
            concept and targets come from the reference code's `prompts` field, base and architecture are "".

    Returns:
        The membrane, on the CPU, in the file's dtype, its values checked.

    Raises:
        MembraneNotFoundError: No such file.
        FormatError: Damaged, hostile, or not a membrane.
        ShapeMismatchError: Factors that do not fit each other.
    """
    return read_with_digest(path)[0]


def read_with_digest(path: Path) -> tuple[Membrane, str]:
    """Reads a membrane file as `read_membrane` does; also returns the sha256 of the very bytes it read."""
    if not path.is_file():
        raise MembraneNotFoundError(f"{path}: no such membrane file; expected a .safetensors file")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise FormatError(f"{path}: {size} bytes; expected a membrane of at most {MAX_FILE_BYTES}")
    content = path.read_bytes()
    try:
        metadata = _checked_header(content)
        tensors = load(content)
        membrane = _assemble(tensors, metadata)
        membrane.check_values()
    except MembraneError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # the safetensors library raises its own class and, for odd headers, others
        raise FormatError(f"{path}: damaged safetensors file ({error}); fetch or train it again") from error
    return membrane, hashlib.sha256(content).hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise FormatError(f"the header names {key!r} twice; expected each tensor once")
        seen[key] = value
    return seen


def _checked_header(content: bytes) -> dict[str, str]:
    """Checks the header against what a membrane may hold and returns its metadata."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise FormatError(
            f"not a safetensors file: {len(content)} bytes, header of {length} announced; "
            "expected a membrane written by safegen, SPM or a kohya trainer"
        )
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"header of {length} bytes; expected at most {MAX_HEADER_BYTES}")
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise FormatError("not a safetensors file: its header is not a JSON object")
    metadata: Any = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{len(header)} tensors; expected at most {MAX_TENSORS}")
    for key, entry in header.items():
        if _KEY.fullmatch(key) is None:
            raise FormatError(f"tensor {key!r}: expected lora_unet_<site>.lora_down.weight, .lora_up.weight or .alpha")
        if entry.get("dtype") not in DTYPES:
            raise FormatError(f"tensor {key!r} has dtype {entry.get('dtype')}; expected one of {sorted(DTYPES)}")
    return {str(k): str(v) for k, v in metadata.items()}


def _assemble(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Membrane:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        assert match is not None  # _checked_header refused other names
        parts.setdefault(match[1], {})[match[2]] = tensor
    factors: dict[str, Factor] = {}
    for key, found in sorted(parts.items()):
        missing = {"lora_down.weight", "lora_up.weight"} - found.keys()
        if missing:
            raise FormatError(f"site {key!r} lacks {', '.join(sorted(missing))}")
        down, up = found["lora_down.weight"], found["lora_up.weight"]
        alpha = found.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            raise FormatError(f"site {key!r}: alpha has shape {list(alpha.shape)}; expected a single number")
        factors[key] = Factor(down, up, float(alpha.item()) if alpha is not None else float(down.shape[0]))
    if not factors:
        raise FormatError("no factors in the file; expected one pair per site")
    return _membrane(factors, metadata)


def _names(value: object) -> list[str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise TypeError(f"safegen.targets is {value!r}, not a list of names")


def _membrane(factors: Mapping[str, Factor], metadata: Mapping[str, str]) -> Membrane:
    own = {name: metadata.get(f"safegen.{name}", "") for name in _OWN}
    found_format = metadata.get("safegen.format", FORMAT)
    if found_format != FORMAT:
        raise FormatError(f"format {found_format!r}; this version of safegen reads {FORMAT!r}")
    prompts = metadata.get("prompts", "")
    try:
        targets = tuple(_names(json.loads(own["targets"]))) if own["targets"] else (prompts,)
    except (ValueError, TypeError) as error:
        raise FormatError(f"its metadata cannot be read ({error}); expected what write_membrane writes") from error
    if not own["concept"] and not prompts:
        raise FormatError("it names no concept: neither safegen.concept nor prompts is in its metadata")
    extra = {k: v for k, v in metadata.items() if k not in _WRITTEN}
    return Membrane(
        concept=own["concept"] or prompts,
        targets=targets,
        base=own["base"],
        architecture=own["architecture"],
        factors=factors,
        surrogate=own["surrogate"],
        metadata=extra,
    )
