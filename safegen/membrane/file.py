"""Membrane files: safetensors in the SPM / kohya layout, with safegen's metadata.

Per site three tensors, `lora_unet_<path with "_" for ".">.lora_down.weight`, `.lora_up.weight` and `.alpha`, as the
reference code of SPM and kohya's LoRA trainers write them; stock diffusers opens the file as a LoRA (without a gate).
A file is checked before a tensor of it is built: what the safetensors library accepts is wider than what a membrane is.
The other layouts (`formats`) are read through the same checks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from safegen.errors import FormatError, InjectionError, MembraneError, MembraneNotFoundError
from safegen.files import write_atomically
from safegen.membrane.layouts import Layout, Place, assemble, classify, group
from safegen.membrane.metadata import ADAPTER, SPEC, SPEC_HASH, described, membrane_of
from safegen.membrane.weights import Membrane

MAX_FILE_BYTES = 64 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
DTYPES = frozenset(("F32", "F16", "BF16"))

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Container:
    """A safetensors file whose header was checked.

    Attributes:
        tensors: Its tensors by name, on the CPU.
        metadata: Its metadata.
        sha256: Digest of the very bytes that were read, in hex.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_membrane(membrane: Membrane, path: str | Path, *, dtype: torch.dtype = torch.float32) -> str:
    """Writes a membrane, atomically; the same membrane gives the same bytes.

    Args:
        membrane: What to write; its values are checked first.
        path: Where to; folders are made.
        dtype: float32, float16 or bfloat16, for the factors (alpha stays float32).

    Returns:
        The sha256 of the file, in hex.

    Raises:
        FormatError: What no reader would accept: NaN, infinity, huge norms, a file over `MAX_FILE_BYTES`; or metadata
            that the writer fills in itself.
    """
    membrane.check_values()
    tensors = {
        name: (tensor if name.endswith(".alpha") else tensor.detach().to("cpu", dtype)).contiguous()
        for name, tensor in membrane.tensors()
    }
    return write_container(tensors, described(membrane), Path(path), limit=MAX_FILE_BYTES)


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
    container, places = read_container(path, limit=MAX_FILE_BYTES, check=_spm_places)
    with located(path):
        membrane = membrane_of(assemble(container.tensors, group(places)), container.metadata)
        membrane.check_values()
    return membrane, container.sha256


def _spm_places(keys: Sequence[str], metadata: Mapping[str, str]) -> dict[str, Place]:
    if ADAPTER in metadata:
        raise FormatError(f"its metadata hold {ADAPTER!r}, which states other scales than the tensors; leave it out")
    places: dict[str, Place] = {}
    for key in keys:
        place = classify(key)
        if place is None or place.layout is not Layout.SPM or place.text:
            raise FormatError(
                f"tensor {key[:300]!r}: expected lora_unet_<site>.lora_down.weight, .lora_up.weight or .alpha; "
                "`safegen convert` reads other layouts"
            )
        places[key] = place
    return places


@contextmanager
def located(path: Path) -> Generator[None]:
    """Puts the file in front of what is wrong with its content."""
    try:
        yield
    except (MembraneError, InjectionError) as error:
        raise type(error)(f"{path}: {error}") from error


def read_container(
    path: Path,
    *,
    limit: int,
    check: Callable[[Sequence[str], Mapping[str, str]], _T],
    alphas: frozenset[str] = DTYPES,
) -> tuple[Container, _T]:
    """Reads a safetensors file that a stranger may have written.

    Args:
        path: The file.
        limit: Most bytes that it may have.
        check: Judges names of tensors and metadata before a tensor is built; raises what it refuses.
        alphas: The dtypes that a tensor named `….alpha` may have; all others have one of `DTYPES`.

    Returns:
        The content, and what `check` returned.

    Raises:
        MembraneNotFoundError: No such file.
        FormatError: Damaged or hostile, or refused by `check`.
    """
    if not path.is_file():
        raise MembraneNotFoundError(f"{path}: no such membrane file; expected a .safetensors file")
    size = path.stat().st_size
    if size > limit:
        raise FormatError(f"{path}: {size} bytes; expected at most {limit}")
    content = path.read_bytes()
    with located(path):
        try:
            header, metadata = _checked_header(content)
            checked = check(list(header), metadata)
            for key, entry in header.items():
                allowed = alphas if key.endswith(".alpha") else DTYPES
                if entry.get("dtype") not in allowed:
                    raise FormatError(
                        f"tensor {key!r} has dtype {entry.get('dtype')}; expected one of {sorted(allowed)}"
                    )
            tensors = load(content)
            _check_hash(content, metadata)
        except MembraneError:
            raise
        except Exception as error:  # the safetensors library raises its own class and, for odd headers, others
            raise FormatError(f"damaged safetensors file ({error}); fetch or train it again") from error
    return Container(tensors, metadata, hashlib.sha256(content).hexdigest()), checked


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object, for `object_pairs_hook`; refuses one that names a key twice."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise FormatError(f"its JSON names {key!r} twice; expected each name once")
        seen[key] = value
    return seen


def _checked_header(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Checks the header against what a membrane may hold; returns its entries and its metadata."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise FormatError(
            f"not a safetensors file: {len(content)} bytes, header of {length} announced; "
            "expected a membrane written by safegen, SPM or a kohya trainer"
        )
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"header of {length} bytes; expected at most {MAX_HEADER_BYTES}")
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise FormatError("not a safetensors file: its header is not a JSON object")
    metadata: Any = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{len(header)} tensors; expected at most {MAX_TENSORS}")
    return header, {str(k): str(v) for k, v in metadata.items()}


def _data_hash(content: bytes) -> str:
    """Returns ModelSpec's hash of the tensor data: all bytes behind the header."""
    return "0x" + hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _check_hash(content: bytes, metadata: Mapping[str, str]) -> None:
    # Other tools hash tensor by tensor, in an order of their own, so only safegen's files can be checked.
    stated = metadata.get(SPEC_HASH)
    if stated is not None and "safegen.format" in metadata and stated != _data_hash(content):
        raise FormatError(f"its tensor data are not those that {SPEC_HASH} states; fetch or train it again")


def write_container(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path, *, limit: int) -> str:
    """Writes a safetensors file, atomically, with its metadata in alphabetical order.

    Args:
        tensors: On the CPU, contiguous.
        metadata: What the header holds; ModelSpec's hash is added where ModelSpec is there.
        path: Where to; folders are made.
        limit: Most bytes that readers accept.

    Returns:
        The sha256 of the file, in hex.

    Raises:
        FormatError: More than readers accept.
    """
    bare = save(dict(tensors))
    start = 8 + int.from_bytes(bare[:8], "little")
    spec = {SPEC_HASH: _data_hash(bare)} if SPEC in metadata else {}
    # The library writes metadata in the order of a hash map, another one in every process.
    header = {"__metadata__": dict(sorted((dict(metadata) | spec).items()))} | json.loads(bare[8:start])
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    if len(tensors) > MAX_TENSORS or len(head) > MAX_HEADER_BYTES or len(head) + len(bare) - start + 8 > limit:
        raise FormatError(
            f"{path}: {len(tensors)} tensors, a header of {len(head)} and data of {len(bare) - start} bytes; readers "
            f"accept {MAX_TENSORS} tensors, {MAX_HEADER_BYTES} bytes of header and {limit} in all: lower the rank"
        )
    content = len(head).to_bytes(8, "little") + head + bare[start:]
    write_atomically(path, lambda draft: draft.write_bytes(content))
    return hashlib.sha256(content).hexdigest()
