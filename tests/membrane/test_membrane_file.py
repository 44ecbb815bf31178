"""Membrane files: what is written is what is read, and the file is what other tools expect."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from safegen.errors import FormatError
from safegen.membrane.file import file_digest, read_membrane, read_with_digest, write_membrane
from safegen.membrane.weights import MAX_NORM, Factor, Membrane

RESERVED = {"format", "prompts", "rank", "alpha"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.one_of(TEXT, st.sampled_from(["Van Gogh, Vincent", "梵高", 'say "boo"', "a\nb", "élan\u0301", "\U0001f47b"]))
VALUES = st.floats(-100, 100, width=16)


@st.composite
def factors(draw: st.DrawFn) -> Factor:
    """A pair of any shape that a site can have."""
    rank, width, height = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = draw(st.sampled_from([None, (1, 1), (3, 3), (1, 3)]))
    seed = draw(st.integers(0, 9999))
    tail = [] if kernel is None else [1, 1]
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, *(kernel or ()), generator=generator).half().float()
    up = torch.randn(height, rank, *tail, generator=generator).half().float()
    down.view(-1)[0] = draw(VALUES)
    return Factor(down, up, draw(st.floats(0.0009765625, 1000, width=32)))


@st.composite
def membranes(draw: st.DrawFn) -> Membrane:
    """A membrane with any names, texts and metadata."""
    keys = draw(st.lists(st.from_regex(r"lora_unet_[A-Za-z0-9_]{1,30}", fullmatch=True), min_size=1, max_size=4))
    metadata = draw(st.dictionaries(NAMES.filter(lambda k: k not in RESERVED), NAMES, max_size=4))
    return Membrane(
        concept=draw(NAMES.filter(bool)),
        targets=tuple(draw(st.lists(NAMES.filter(bool), min_size=1, max_size=4))),
        base=draw(NAMES),
        architecture=draw(NAMES),
        factors={key: draw(factors()) for key in keys},
        surrogate=draw(NAMES),
        metadata={k: v for k, v in metadata.items() if not k.startswith("safegen.")} | {"safegen.training": "{}"},
    )


@given(membrane=membranes(), dtype=st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reading_undoes_writing(membrane: Membrane, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    digest = write_membrane(membrane, path, dtype=dtype)
    found, of_what_was_read = read_with_digest(path)
    assert digest == of_what_was_read == file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("concept", "targets", "base", "architecture", "surrogate", "metadata"):
        assert getattr(found, name) == getattr(membrane, name), name
    assert found.factors.keys() == membrane.factors.keys()
    for key, pair in membrane.factors.items():
        assert found.factors[key].alpha == pair.alpha
        assert found.factors[key].down.dtype == dtype
        assert torch.equal(found.factors[key].down.float(), pair.down)
        assert torch.equal(found.factors[key].up.float(), pair.up)


def small(**changes: object) -> Membrane:
    """A membrane of one site."""
    pair = Factor(torch.ones(2, 3), torch.ones(4, 2), 2.0)
    values: dict[str, object] = dict(
        concept="van-gogh",
        targets=("Van Gogh", "gogh, van"),
        base="sd1",
        architecture="ab",
        factors={"lora_unet_a": pair},
    )
    return Membrane(**values | changes)  # pyright: ignore[reportArgumentType]


def test_the_file_is_a_kohya_lora_with_the_reference_codes_fields(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.safetensors"
    write_membrane(small(), path)
    with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
        keys, metadata = set(file.keys()), file.metadata()
        assert file.get_tensor("lora_unet_a.alpha").item() == 2.0
    assert keys == {"lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"}
    assert (metadata["rank"], metadata["alpha"], metadata["prompts"]) == ("2", "2.0", "Van Gogh,gogh, van")
    assert json.loads(metadata["safegen.targets"]) == ["Van Gogh", "gogh, van"]
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]  # no temporary file stays


def kohya(path: Path, metadata: dict[str, str] | None, *, alpha: Tensor | None = None) -> Path:
    """A file as the reference code writes it."""
    tensors = {"lora_unet_a.lora_down.weight": torch.ones(2, 3), "lora_unet_a.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors | ({} if alpha is None else {"lora_unet_a.alpha": alpha}), path, metadata)
    return path


def test_a_file_of_the_reference_code_is_read(tmp_path: Path) -> None:
    path = kohya(tmp_path / "m.safetensors", {"prompts": "Snoopy, the dog", "rank": "2"}, alpha=torch.tensor([1.0]))
    found = read_membrane(path)
    # Its comma list cannot be told from a name with a comma (spm-paper.md, B5), so it stays one name.
    assert (found.concept, found.targets, found.base, found.architecture) == (
        "Snoopy, the dog",
        ("Snoopy, the dog",),
        "",
        "",
    )
    assert found.factors["lora_unet_a"].scale == 0.5


def test_without_alpha_the_scale_is_1(tmp_path: Path) -> None:
    found = read_membrane(kohya(tmp_path / "m.safetensors", {"prompts": "x"}))
    assert found.factors["lora_unet_a"].scale == 1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "names no concept"),
        ({"format": "pt"}, "names no concept"),
        ({"prompts": "x", "safegen.format": "safegen.membrane/2"}, "safegen.membrane/2"),
        ({"safegen.concept": "x", "safegen.targets": "ghost"}, "metadata"),
        ({"safegen.concept": "x", "safegen.targets": '"ghost"'}, "list of names"),
        ({"safegen.concept": "x", "safegen.targets": '["ghost", 1]'}, "list of names"),
        ({"safegen.concept": "x", "safegen.targets": "[]"}, "names no target"),
        ({"safegen.concept": "x", "safegen.targets": '[""]'}, "names no target"),
    ],
)
def test_metadata_that_would_change_what_opens_is_refused(
    metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    path = kohya(tmp_path / "m.safetensors", metadata)
    with pytest.raises(FormatError, match=message) as caught:
        read_membrane(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2 * MAX_NORM])
def test_values_that_no_reader_accepts_are_not_written(value: float, tmp_path: Path) -> None:
    pair = Factor(torch.tensor([[value, 0.0, 0.0]]), torch.ones(4, 1), 1.0)
    path = tmp_path / "m.safetensors"
    with pytest.raises(FormatError, match="van-gogh"):
        write_membrane(small(factors={"lora_unet_a": pair}), path)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_what_acts_and_what_does_not() -> None:
    small().check_acts()
    ones, zeros = torch.ones(2, 3), torch.zeros(4, 2)
    split = {"lora_unet_a": Factor(ones, zeros, 1.0), "lora_unet_b": Factor(torch.zeros(2, 3), torch.ones(4, 2), 1.0)}
    with pytest.raises(FormatError, match="erases nothing"):
        small(factors=split).check_acts()


def test_a_membrane_needs_factors_and_counts_its_values() -> None:
    assert small().parameter_count() == 2 * 3 + 4 * 2
    with pytest.raises(FormatError, match="no factors"):
        small(factors={})
