"""Files that are no membranes, or membranes meant to harm: each is refused and named, and nothing of it is run."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safegen.errors import FormatError, MembraneNotFoundError, SafegenError, ShapeMismatchError
from safegen.membrane.file import MAX_FILE_BYTES, read_membrane

DOWN, UP, ALPHA = "lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"
META = {"prompts": "ghost"}

Entry = tuple[str, list[int], bytes]


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def packed(entries: list[tuple[str, Entry]], metadata: Any = META) -> bytes:
    """A safetensors file of these tensors, its header written by hand: keys may repeat, anything may lie."""
    parts = [f'"__metadata__":{json.dumps(metadata)}'] if metadata is not None else []
    data = b""
    for name, (dtype, shape, content) in entries:
        place = [len(data), len(data) + len(content)]
        parts.append(f"{json.dumps(name)}:" + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": place}))
        data += content
    header = ("{" + ",".join(parts) + "}").encode()
    return len(header).to_bytes(8, "little") + header + data


GOOD: list[tuple[str, Entry]] = [
    (DOWN, ("F32", [1, 2], floats(1, 2))),
    (UP, ("F32", [2, 1], floats(1, 1))),
    (ALPHA, ("F32", [], floats(1))),
]
SOUND = packed(GOOD)


def changed(name: str, entry: Entry) -> bytes:
    return packed([(key, entry if key == name else old) for key, old in GOOD])


class Bomb:
    """Unpickled, it would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/safegen-was-here"),))


def header_of(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


FILES: dict[str, tuple[bytes, type[SafegenError]]] = {
    "empty": (b"", FormatError),
    "seven bytes": (b"\0" * 7, FormatError),
    "eight zero bytes": (b"\0" * 8, FormatError),
    "text": (b"this is not a membrane, this is a letter", FormatError),
    "truncated in the header": (SOUND[:40], FormatError),
    "truncated in the data": (SOUND[:-3], FormatError),
    "bytes behind the data": (SOUND + b"\0" * 16, FormatError),
    "header length over the file": ((1 << 62).to_bytes(8, "little") + SOUND[8:], FormatError),
    "header length of all ones": (b"\xff" * 8 + SOUND[8:], FormatError),
    "header length too short": ((40).to_bytes(8, "little") + SOUND[8:], FormatError),
    "header over 1 MiB": (packed(GOOD, META | {"x": "y" * (1 << 20)}), FormatError),
    "header not JSON": (header_of(b"{not json}"), FormatError),
    "header not UTF-8": (header_of(b'{"\xff\xfe": 1}'), FormatError),
    "header a list": (header_of(b"[]"), FormatError),
    "header a thousand lists deep": (header_of(b"[" * 100_000), FormatError),
    "entry not an object": (header_of(json.dumps({DOWN: [1, 2]}).encode()), FormatError),
    "metadata a list": (packed(GOOD, ["ghost"]), FormatError),
    "metadata of a number": (packed(GOOD, {"prompts": "ghost", "rank": 1}), FormatError),
    "alphas in the metadata too": (packed(GOOD, META | {"lora_adapter_metadata": "{}"}), FormatError),
    "no tensors": (packed([]), FormatError),
    "a tensor twice": (packed([*GOOD, (UP, ("F32", [2, 1], floats(9, 9)))]), FormatError),
    "metadata twice": (SOUND.replace(b'"prompts": "ghost"', b'"prompts": "ghost", "prompts": ""'), FormatError),
    "pickle": (pickle.dumps(Bomb()), FormatError),
    "zip": (b"PK\x03\x04" + b"\0" * 60, FormatError),
    "keys of a text encoder": (packed([("lora_te_a.lora_down.weight", GOOD[0][1])]), FormatError),
    "keys of PEFT": (packed([("unet.a.lora_A.weight", GOOD[0][1])]), FormatError),
    "a path for a key": (packed([("../../etc/passwd", GOOD[0][1])]), FormatError),
    "one foreign key": (packed([*GOOD, ("unet.conv_in.weight", GOOD[0][1])]), FormatError),
    "a key with a line break": (packed([*GOOD[:2], (ALPHA + "\n", GOOD[2][1])]), FormatError),
    "missing up": (packed([GOOD[0], GOOD[2]]), FormatError),
    "missing down": (packed([GOOD[1], GOOD[2]]), FormatError),
    "alpha only": (packed([GOOD[2]]), FormatError),
    "NaN": (changed(UP, ("F32", [2, 1], floats(1, float("nan")))), FormatError),
    "infinity": (changed(DOWN, ("F32", [1, 2], floats(float("-inf"), 1))), FormatError),
    "huge norm": (changed(DOWN, ("F32", [1, 2], floats(3e4, 1))), FormatError),
    "a norm that overflows": (changed(DOWN, ("F32", [1, 2], floats(3e38, 3e38))), FormatError),
    "alpha NaN": (changed(ALPHA, ("F32", [], floats(float("nan")))), FormatError),
    "alpha 0": (changed(ALPHA, ("F32", [], floats(0))), FormatError),
    "alpha negative": (changed(ALPHA, ("F32", [], floats(-1))), FormatError),
    "alpha huge": (changed(ALPHA, ("F32", [], floats(1e30))), FormatError),
    "two alphas": (changed(ALPHA, ("F32", [2], floats(1, 1))), FormatError),
    "I64": (changed(UP, ("I64", [2, 1], b"\0" * 16)), FormatError),
    "F8": (changed(UP, ("F8_E4M3", [2, 1], b"\0" * 2)), FormatError),
    "F64": (changed(UP, ("F64", [2, 1], b"\0" * 16)), FormatError),
    "BOOL": (changed(UP, ("BOOL", [2, 1], b"\0" * 2)), FormatError),
    "shape that lies": (changed(UP, ("F32", [200, 1], floats(1, 1))), FormatError),
    "negative shape": (changed(UP, ("F32", [-2, -1], floats(1, 1))), FormatError),
    "mismatched ranks": (changed(UP, ("F32", [1, 2], floats(1, 1))), ShapeMismatchError),
    "rank 0": (
        packed([(DOWN, ("F32", [0, 1 << 60], b"")), (UP, ("F32", [1 << 60, 0], b"")), GOOD[2]]),
        ShapeMismatchError,
    ),
    "a vector": (changed(UP, ("F32", [2], floats(1, 1))), ShapeMismatchError),
    "up with a kernel": (
        packed(
            [(DOWN, ("F32", [1, 2, 1, 1], floats(1, 2))), (UP, ("F32", [1, 1, 2, 1], floats(1, 1))), GOOD[2]],
        ),
        ShapeMismatchError,
    ),
    "10 000 tensors": (
        packed([(f"lora_unet_{k}.alpha", ("F32", [], floats(1))) for k in range(10_000)]),
        FormatError,
    ),
    "5 000 tensors": (packed([(f"lora_unet_{k}.alpha", ("F32", [], floats(1))) for k in range(5000)]), FormatError),
}


def refuse(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("a pickle was loaded")


@pytest.fixture(autouse=True)
def _no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)


def refused(path: Path, error: type[SafegenError]) -> str:
    started = time.perf_counter()
    with pytest.raises(error) as caught:
        read_membrane(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.perf_counter() - started < 2
    return str(caught.value)


def test_the_file_that_all_others_are_made_from_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(SOUND)
    assert read_membrane(path).factors["lora_unet_a"].down.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("name", FILES)
def test_it_is_refused_and_named(name: str, tmp_path: Path) -> None:
    content, error = FILES[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(path, error)
    assert not Path("/tmp/safegen-was-here").exists()


def test_the_limit_on_the_header_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(FILES["header over 1 MiB"][0])
    assert "at most 1048576" in refused(path, FormatError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Both entries point at the same bytes: the safetensors library takes the last one and says nothing.
        (SOUND.replace(b'"lora_unet_a.alpha"', b'"lora_unet_a.lora_up.weight":{},"lora_unet_a.alpha"'), "twice"),
        (packed(GOOD).replace(b'"ghost"', b'"ghost", "prompts": "fox"'), "'prompts' twice"),
        (FILES["a key with a line break"][0], "expected lora_unet_<site>"),
    ],
)
def test_what_the_library_would_take_is_refused_for_the_right_reason(
    content: bytes, message: str, tmp_path: Path
) -> None:
    header = content[8 : content.index(b"}}", 8) + 2]  # its length changed
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + content[8:])
    assert message in refused(path, FormatError)


def test_ten_thousand_tensors_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safegen.membrane.file as module

    monkeypatch.setattr(module, "load", refuse)
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 1 << 21)
    path = tmp_path / "m.safetensors"
    path.write_bytes(FILES["10 000 tensors"][0])
    assert "at most 4096" in refused(path, FormatError)


@pytest.mark.parametrize("name", ["foreign keys", "dtype"])
def test_no_tensor_is_built_of_a_header_that_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safegen.membrane.file as module

    monkeypatch.setattr(module, "load", refuse)
    path = tmp_path / "m.safetensors"
    path.write_bytes(FILES["one foreign key" if name == "foreign keys" else "I64"][0])
    refused(path, FormatError)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    monkeypatch.setattr(Path, "read_bytes", refuse)
    refused(path, FormatError)


@pytest.mark.parametrize("kind", ["absent", "folder", "dangling link"])
def test_what_is_no_file_is_not_found(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    make: dict[str, Callable[[], object]] = {
        "absent": lambda: None,
        "folder": path.mkdir,
        "dangling link": lambda: path.symlink_to(tmp_path / "nowhere"),
    }
    make[kind]()
    refused(path, MembraneNotFoundError)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        found = read_membrane(path)
    except (FormatError, ShapeMismatchError):
        return
    found.check_values()
