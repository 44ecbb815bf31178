"""LoRA files of other layouts that are damaged, mixed up or meant to harm: each is refused for its own reason."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile_membrane_files import FILES, GOOD, META, Bomb, Entry, floats, packed, refuse

from safegen.errors import FormatError, InjectionError, MembraneError, ShapeMismatchError
from safegen.membrane import file as module
from safegen.membrane.formats import MAX_LORA_BYTES, read_lora

A: Entry = ("F32", [1, 2], floats(1, 2))
B: Entry = ("F32", [2, 1], floats(1, 1))
ONE: Entry = ("F32", [], floats(1))
PEFT: list[tuple[str, Entry]] = [("unet.a.b.lora_A.weight", A), ("unet.a.b.lora_B.weight", B)]
PROCESSOR: list[tuple[str, Entry]] = [
    ("unet.a.attn1.processor.to_q_lora.down.weight", A),
    ("unet.a.attn1.processor.to_q_lora.up.weight", B),
]
LAYER: list[tuple[str, Entry]] = [("unet.a.attn1.to_q.lora.down.weight", A), ("unet.a.attn1.to_q.lora.up.weight", B)]
NUMBERED: list[tuple[str, Entry]] = [("unet:0:down", A), ("unet:0:up", B)]
RANKS = {"unet": '["Attention"]', "unet:0:rank": "1"}
TEXT: list[tuple[str, Entry]] = [("text_encoder.a.lora_A.weight", A), ("text_encoder.a.lora_B.weight", B)]


def stated(**settings: Any) -> bytes:
    """A PEFT file with LoRA settings in its metadata."""
    said = {"unet.r": 1, "unet.lora_alpha": 1} | {f"unet.{name}": value for name, value in settings.items()}
    return packed(PEFT, META | {"lora_adapter_metadata": json.dumps(said)})


def raw(settings: str) -> bytes:
    return packed(PEFT, META | {"lora_adapter_metadata": settings})


CASES: dict[str, tuple[bytes, type[Exception], str]] = {
    "pickle": (pickle.dumps(Bomb()), FormatError, "not a safetensors file"),
    "only text encoder": (packed(TEXT), FormatError, "belong to a text encoder"),
    "text encoder too": (packed([*PEFT, *TEXT]), FormatError, "2 of 4 tensors belong to a text encoder"),
    "SPM and PEFT": (packed([*GOOD, *PEFT]), FormatError, "mixed layouts"),
    "PEFT and old": (packed([*PEFT, *LAYER]), FormatError, "mixed layouts"),
    "old and numbered": (packed([*LAYER, *NUMBERED]), FormatError, "mixed layouts"),
    "with and without prefix": (
        packed([*PEFT, ("c.lora_A.weight", A), ("c.lora_B.weight", B)]),
        FormatError,
        "mixed prefixes",
    ),
    "unet and transformer": (
        packed([*PEFT, ("transformer.c.lora_A.weight", A), ("transformer.c.lora_B.weight", B)]),
        FormatError,
        "mixed prefixes",
    ),
    "a foreign key": (
        packed([*PEFT, ("unet.conv_in.weight", A)]),
        FormatError,
        "'unet.conv_in.weight' is of no layout",
    ),
    "a weight": (packed([("model.diffusion_model.out.weight", A)]), FormatError, "another implementation"),
    "DoRA of kohya": (packed([*GOOD, ("lora_unet_a.dora_scale", A)]), FormatError, "DoRA"),
    "DoRA of PEFT": (packed([*PEFT, ("unet.a.b.lora_magnitude_vector", A)]), FormatError, "DoRA"),
    "LoHa": (packed([("lora_unet_a.hada_w1_a", A)]), FormatError, "Hadamard"),
    "LoKr": (packed([("lora_unet_a.lokr_w1", A)]), FormatError, "Kronecker"),
    "Tucker": (packed([*GOOD, ("lora_unet_a.lora_mid.weight", A)]), FormatError, "Tucker"),
    "a bias": (packed([*PEFT, ("unet.a.b.lora_B.bias", A)]), FormatError, "a bias"),
    "a named adapter": (packed([("unet.a.lora_A.default.weight", A)]), FormatError, "of no layout"),
    "an empty step": (packed([("unet.a..b.lora_A.weight", A)]), FormatError, "of no layout"),
    "a path for a key": (packed([("../../x.lora_A.weight", A)]), FormatError, "of no layout"),
    "letters beyond ASCII": (packed([("unet.а.lora_A.weight", A)]), FormatError, "of no layout"),
    "a line break": (packed([("unet.a.lora_A.weight\n", A)]), FormatError, "of no layout"),
    "an endless key": (packed([("unet." + "a." * 400 + "lora_A.weight", A)]), FormatError, "of no layout"),
    "no factors": (packed([]), FormatError, "no factors"),
    "alphas only": (packed([("unet.a.alpha", ONE)]), FormatError, "no factors"),
    "alpha of nothing": (packed([*PEFT, ("unet.c.alpha", ONE)]), FormatError, "lacks its down and its up factor"),
    "A alone": (packed(PEFT[:1]), FormatError, "'lora_unet_a_b' lacks its up factor"),
    "B alone": (packed(PEFT[1:]), FormatError, "'lora_unet_a_b' lacks its down factor"),
    "down alone": (packed(PROCESSOR[:1]), FormatError, "lacks its up factor"),
    "twice after normalisation": (
        packed([*PEFT, ("unet.a_b.lora_A.weight", A), ("unet.a_b.lora_B.weight", B)]),
        FormatError,
        "both name site 'lora_unet_a_b'",
    ),
    "two halves of two sites": (packed([PEFT[0], ("unet.a_b.lora_B.weight", B)]), FormatError, "both name site"),
    "processor and layer": (packed([*PROCESSOR, *LAYER]), FormatError, "both name site 'lora_unet_a_attn1_to_q'"),
    "ranks that differ": (packed([PEFT[0], (PEFT[1][0], A)]), ShapeMismatchError, "has rank 2; expected the same rank"),
    "a scalar factor": (packed([(PEFT[0][0], ONE), PEFT[1]]), ShapeMismatchError, "down []"),
    "a scalar factor with settings": (
        packed([(PEFT[0][0], ONE), PEFT[1]], META | {"lora_adapter_metadata": '{"unet.r": 0, "unet.lora_alpha": 1}'}),
        ShapeMismatchError,
        "down []",
    ),
    "alpha of two": (packed([*PEFT, ("unet.a.b.alpha", ("F32", [2], floats(1, 1)))]), FormatError, "single number"),
    "alpha negative": (packed([*PEFT, ("unet.a.b.alpha", ("F32", [], floats(-1)))]), FormatError, "alpha is -1"),
    "alpha of 8 bits": (packed([*PEFT, ("unet.a.b.alpha", ("I8", [], b"\1"))]), FormatError, "dtype I8"),
    "I64 factor": (packed([(PEFT[0][0], ("I64", [1, 2], b"\0" * 16)), PEFT[1]]), FormatError, "dtype I64"),
    "alphas twice": (
        packed([*PEFT, ("unet.a.b.alpha", ONE)], META | {"lora_adapter_metadata": '{"unet.r": 1}'}),
        FormatError,
        "stated twice",
    ),
    "settings for another layout": (
        packed(GOOD, META | {"lora_adapter_metadata": "{}"}),
        FormatError,
        "another layout",
    ),
    "settings not JSON": (raw("{"), FormatError, "not JSON"),
    "settings a list": (raw("[]"), FormatError, "LoRA settings are list"),
    "settings a thousand deep": (raw("[" * 100_000), FormatError, "not JSON"),
    "settings twice": (raw('{"unet.r": 1, "unet.r": 2}'), FormatError, "'unet.r' twice"),
    "settings of another part": (raw('{"unet.r": 1, "transformer.r": 1}'), FormatError, "'transformer.r'"),
    "settings without alpha": (raw('{"unet.r": 1}'), FormatError, "alpha None"),
    "settings of another rank": (stated(r=2), FormatError, "state rank 2 for site 'a.b'"),
    "alpha a text": (stated(lora_alpha="1"), FormatError, "alpha '1'"),
    "alpha true": (stated(lora_alpha=True), FormatError, "alpha True"),
    "alpha not a number": (raw('{"unet.r": 1, "unet.lora_alpha": NaN}'), FormatError, "alpha is nan"),
    "alpha zero": (stated(lora_alpha=0), FormatError, "alpha is 0"),
    "a slow expression": (stated(alpha_pattern={"(a+)+$": 2}), FormatError, "no path of a module"),
    "patterns a list": (stated(rank_pattern=["a"]), FormatError, "rank_pattern is list"),
    "DoRA in the settings": (stated(use_dora=True), FormatError, "use_dora = 'True'"),
    "PiSSA": (stated(init_lora_weights="pissa"), FormatError, "init_lora_weights = 'pissa'"),
    "biases in the settings": (stated(bias="lora_only"), FormatError, "bias = 'lora_only'"),
    "an unknown setting": (stated(use_magic={"a": 1}), FormatError, "use_magic"),
    "PEFT's folder without its settings": (
        packed([(f"base_model.model.{key.removeprefix('unet.')}", entry) for key, entry in PEFT]),
        FormatError,
        "adapter_config.json",
    ),
    "numbers without a host": (packed(NUMBERED, META | RANKS), FormatError, "give the host"),
    "a number with a leading zero": (packed([("unet:00:down", A)]), FormatError, "of no layout"),
    "a number of five digits": (packed([("unet:10000:down", A)]), FormatError, "of no layout"),
    "an embedding": (packed([*NUMBERED, ("<s1>", A)], META | RANKS | {"<s1>": "<embed>"}), FormatError, "'<s1>'"),
}

# Refused by the reader of membranes, and what becomes of them here.
TAKEN = {"keys of PEFT": "lacks its up factor", "keys of a text encoder": "text encoder"}


@pytest.fixture(autouse=True)
def _no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)


def refused(path: Path, error: type[Exception]) -> str:
    started = time.perf_counter()
    with pytest.raises(error) as caught:
        read_lora(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.perf_counter() - started < 2
    return str(caught.value)


def placed(folder: Path, content: bytes) -> Path:
    path = folder / "m.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("sample", [PEFT, PROCESSOR, LAYER], ids=["PEFT", "processor", "layer"])
def test_the_files_that_all_others_are_made_from_are_sound(sample: list[tuple[str, Entry]], tmp_path: Path) -> None:
    (factor,) = read_lora(placed(tmp_path, packed(sample))).factors.values()
    assert (factor.down.tolist(), factor.scale) == ([[1.0, 2.0]], 1)


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_for_its_own_reason(name: str, tmp_path: Path) -> None:
    content, error, reason = CASES[name]
    assert reason in refused(placed(tmp_path, content), error)
    assert not Path("/tmp/safegen-was-here").exists()


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        (b"\xff\xfe{}", "not JSON"),
        (b"[]", "LoRA settings are list"),
        (b'{"r": 1, "lora_alpha": 1, "r": 1}', "'r' twice"),
        (b'{"r": 2, "lora_alpha": 1}', "state rank 2"),
        (b'{"r": 1, "lora_alpha": 1, "note": "' + b"x" * (1 << 20) + b'"}', "at most 1048576 bytes"),
    ],
)
def test_settings_beside_the_file_are_no_safer_than_those_in_it(beside: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(beside)
    content = packed([(f"base_model.model.{key.removeprefix('unet.')}", entry) for key, entry in PEFT])
    assert reason in refused(placed(tmp_path, content), FormatError)


def test_there_are_no_two_cases_of_one_kind() -> None:
    assert len(CASES) == len({content for content, _, _ in CASES.values()}) >= 25


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_membrane_is_no_lora(name: str, tmp_path: Path) -> None:
    content, error = FILES[name]
    if name in ("alpha huge", "NaN", "infinity", "huge norm", "a norm that overflows"):  # judged with the values
        reading = read_lora(placed(tmp_path, content))
        with pytest.raises(error):
            reading.membrane()
        return
    assert TAKEN.get(name, "") in refused(placed(tmp_path, content), error)


@pytest.mark.parametrize("name", ["a foreign key", "I64 factor", "SPM and PEFT", "text encoder too"])
def test_no_tensor_is_built_of_names_that_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load", refuse)
    refused(placed(tmp_path, CASES[name][0]), FormatError)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_LORA_BYTES + 1)  # sparse
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "at most" in refused(path, FormatError)


@given(data=st.data(), sample=st.sampled_from([stated(), packed(PROCESSOR), packed(NUMBERED, META | RANKS)]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(data: st.DataObject, sample: bytes, tmp_path: Path) -> None:
    content = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_lora(placed(tmp_path, bytes(content))).membrane()
    except (MembraneError, InjectionError):
        return
    found.check_values()
