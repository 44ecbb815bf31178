"""Thresholds measured on prompts, and how they travel."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import by_hand, install, random_membrane, tiny_sd

from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.errors import FormatError, UsageError
from safegen.membrane.calibrated import with_section, write_calibration
from safegen.membrane.file import read_membrane
from safegen.transport.calibrate import auroc, calibrate, false_open_at_99, thresholds
from safegen.transport.calibration import METADATA_KEY, Calibration, found, merged, parse, section, text_of
from safegen.transport.curve import Curve
from safegen.transport.transport import Gate, Target

SCORES = st.lists(st.floats(-1, 1), min_size=1, max_size=40).map(lambda v: torch.tensor(v, dtype=torch.float64))


@pytest.fixture(scope="module")
def backend() -> Backend:
    return backend_of(tiny_sd())


@given(positives=SCORES, negatives=SCORES)
def test_auroc_counts_pairs(positives: torch.Tensor, negatives: torch.Tensor) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positives.tolist() for n in negatives.tolist()]
    assert auroc(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))


@given(positives=SCORES, negatives=SCORES)
def test_thresholds_are_ordered_and_keep_the_negatives_out(positives: torch.Tensor, negatives: torch.Tensor) -> None:
    lo, hi = thresholds(positives, negatives)
    assert -1 <= lo <= hi <= 1
    assert float((negatives > lo + 1e-6).double().mean()) <= 0.002
    if float(positives.min()) > float(negatives.max()) + 1e-4:
        assert float(negatives.max()) < lo < hi < float(positives.min())


@given(positives=SCORES, negatives=SCORES, neighbours=SCORES)
def test_no_neighbour_opens(positives: torch.Tensor, negatives: torch.Tensor, neighbours: torch.Tensor) -> None:
    lo, hi = thresholds(positives, negatives, neighbours)
    assert lo <= hi <= 1
    assert float(neighbours.max()) <= lo + 1e-6


def test_false_openings_where_99_of_100_positives_open() -> None:
    positives = torch.linspace(0.5, 1.0, 101, dtype=torch.float64)
    negatives = torch.tensor([0.1, 0.5, 0.504, 0.9], dtype=torch.float64)
    assert false_open_at_99(positives, negatives) == 0.25
    assert false_open_at_99(positives, negatives - 0.5) == 0.0


def test_what_was_calibrated_opens_for_positives_and_not_for_negatives(backend: Backend) -> None:
    positives = ["ghost", "a ghost", "the ghost"]
    negatives = ["a fox", "the robot in a photo", "santa", "a white van", "the ghost of a fox"]
    neighbours = ["the robot in a photo", "the ghost of a fox"]
    seen: list[int] = []
    measured = calibrate(backend, ["ghost"], positives, negatives, neighbours=neighbours, report=seen.append)
    assert seen == [7]
    assert [one.score for one in measured] == ["direction", "paper"]
    for one in measured:
        assert one.encoder == backend.fingerprint
        assert (one.positives, one.negatives) == (3, 4)  # the last negative names the concept
        gate = Gate(backend, [Target(("ghost",), {one.score: one.curve})], lambda _: {})
        ids = backend.tokenise(negatives[:-1])
        assert gate.read(backend.encode(ids), ids.tolist()).permeability.max().item() == 0.0
        ids = backend.tokenise(["ghost"])
        assert gate.read(backend.encode(ids), ids.tolist()).permeability.item() == 1.0


@pytest.mark.parametrize(("positives", "negatives"), [([], ["a fox"]), (["a ghost"], ["ghosts"]), (["a ghost"], [])])
def test_calibrating_takes_both_kinds(positives: list[str], negatives: list[str], backend: Backend) -> None:
    with pytest.raises(UsageError, match="give more captions"):
        calibrate(backend, ["ghost"], positives, negatives)


def test_metadata_keeps_calibrations(backend: Backend) -> None:
    first = [by_hand("direction", backend, 0.25), by_hand("paper", backend, 0.5)]
    assert parse({METADATA_KEY: text_of(first)}) == tuple(first)
    assert parse({}) == ()
    other = Calibration("direction", "sha256:other", 0.1, 0.2, 1.0, 0.0, 5, 5)
    again = by_hand("direction", backend, 0.75)
    assert merged([*first, other], [again]) == (first[1], other, again)
    assert found([first[0], other], "direction", "sha256:other") == other
    assert found([first[0]], "direction", "sha256:another") is None
    assert found([first[0]], "paper", backend.fingerprint) is None
    assert again.curve == Curve(0.75, 1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"score": "lexical"},
        {"lo": 0.9, "hi": 0.8},
        {"lo": float("nan")},
        {"hi": 1.5},
        {"auroc": 2},
        {"encoder": ""},
        {"positives": 0},
        {"positives": "many"},
        {"lo": True},
        {"hi": None},
    ],
)
def test_a_calibration_that_nobody_can_have_measured_is_refused(change: dict[str, Any], backend: Backend) -> None:
    values = json.loads(text_of([by_hand("direction", backend, 0.5)]))[0] | change
    with pytest.raises(FormatError, match="run `safegen calibrate` again"):
        parse({METADATA_KEY: json.dumps([values])})


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '[{"score": "direction"}]'])
def test_metadata_that_is_no_calibration_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        parse({METADATA_KEY: text})


# Fingerprints


def test_a_fingerprint_is_of_weights_and_vocabulary() -> None:
    first = backend_of(tiny_sd())
    assert backend_of(tiny_sd()).fingerprint == first.fingerprint
    assert backend_of(tiny_sd(seed=1)).fingerprint != first.fingerprint
    half = tiny_sd()
    half.text_encoder.half()
    rounded = tiny_sd()
    rounded.text_encoder.half().float()
    assert backend_of(half).fingerprint == backend_of(rounded).fingerprint == first.fingerprint
    changed = tiny_sd()
    changed.text_encoder.get_input_embeddings().weight.data[3] += 0.1
    assert backend_of(changed).fingerprint != first.fingerprint
    taught = tiny_sd()
    taught.tokenizer.add_tokens(["<thing>"])
    assert backend_of(taught).fingerprint != first.fingerprint


# Files


def test_writing_a_calibration_touches_no_bit_of_the_tensors(tmp_path: Path) -> None:
    pipe = tiny_sd()
    membrane = random_membrane(pipe)
    path = next(install(tmp_path, membrane).rglob("*.safetensors"))
    before, tensors, old = path.read_bytes(), load_file(path), hashlib.sha256(path.read_bytes()).hexdigest()
    card = path.with_name("card.md")
    card.write_text(f"# A card\n\nsha256 `{old}`\n")
    entry = by_hand("direction", backend_of(pipe), 0.25)
    write_calibration(path, text_of([entry]), section([entry]))
    digest = write_calibration(path, text_of([entry]), section([entry]))
    after = path.read_bytes()
    assert digest == hashlib.sha256(after).hexdigest()

    def data(content: bytes) -> bytes:
        return content[8 + int.from_bytes(content[:8], "little") :]

    assert data(before) == data(after)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_file(path).items())
    found = read_membrane(path)
    assert parse(found.metadata) == (entry,)
    assert (found.concept, found.targets, found.architecture) == (membrane.concept, ("ghost",), membrane.architecture)
    text = card.read_text()
    assert old not in text
    assert digest in text
    assert text.count("## Calibration") == 1
    assert "| direction | 0.2500 | 1.0000 |" in text
    assert sorted(p.name for p in path.parent.iterdir()) == ["card.md", "membrane.safetensors"]


def test_a_section_takes_the_place_of_the_one_before() -> None:
    card = "# A\n\ntext\n\n## Calibration\n\nold\n\n## After\n\nmore\n"
    assert with_section(card, "## Calibration\n\nnew\n") == "# A\n\ntext\n\n## Calibration\n\nnew\n\n## After\n\nmore\n"
    assert with_section("# A", "## Calibration\n\nnew") == "# A\n\n## Calibration\n\nnew\n"


def test_a_damaged_file_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError):
        write_calibration(path, "[]", "")
    assert path.read_bytes() == b"nothing"


def test_the_shipped_membranes_are_calibrated_for_the_shipped_model(tmp_path: Path) -> None:
    from safegen import mini
    from safegen.mini import zoo
    from safegen.resources import shipped

    fingerprint = backend_of(mini.load()).fingerprint
    for concept in zoo.CONCEPTS:
        folder = shipped("membranes") / "mini" / concept
        path = Path(shutil.copy(folder / "membrane.safetensors", tmp_path))
        measured = parse(read_membrane(path).metadata)
        assert {one.score for one in measured} == {"direction", "paper"}
        assert {one.encoder for one in measured} == {fingerprint}
        card = (folder / "card.md").read_text("utf-8")
        assert section(measured) in card
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card
