"""The optional sentence encoder, on a tiny real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_sd, tiny_sentence_encoder

from safegen.backend import backend_of
from safegen.errors import UnsupportedBackendError, UsageError
from safegen.transport.calibrate import calibrate
from safegen.transport.curve import Curve
from safegen.transport.sentence import SentenceEncoder
from safegen.transport.transport import Gate, Target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sentence_encoder(tmp_path_factory.mktemp("sentence") / "model")


def test_vectors_are_the_mean_of_real_tokens_at_unit_length(folder: Path) -> None:
    encoder = SentenceEncoder(str(folder))
    alone, padded = encoder.encode(["a ghost"])[0], encoder.encode(["a ghost", "the van in the style of the fox"])[0]
    torch.testing.assert_close(SentenceEncoder(str(folder)).encode(["x", "a ghost"])[1], alone, atol=1e-5, rtol=1e-4)
    assert alone.norm().item() == pytest.approx(1)
    assert torch.equal(alone, padded)  # kept
    assert encoder.fingerprint == SentenceEncoder(str(folder)).fingerprint


def test_the_gate_opens_by_meaning_where_the_words_are_known(folder: Path) -> None:
    backend, encoder = backend_of(tiny_sd()), SentenceEncoder(str(folder))
    gate = Gate(backend, [Target(("a ghost",), {"semantic": Curve(0.9999, 1.0)})], lambda _: {}, sentence=encoder)
    ids = backend.tokenise(["a ghost", "the van"])
    states, rows = backend.encode(ids), ids.tolist()
    assert gate.read(states, rows).permeability.squeeze(1).tolist() == [1.0, 0.0]
    unknown = gate.read(states, [None, None])
    assert unknown.permeability.squeeze(1).tolist() == [0.0, 0.0]
    assert unknown.score(0, 0).semantic is None


def test_a_sentence_encoder_of_nan_refuses(folder: Path) -> None:
    encoder = SentenceEncoder(str(folder))
    encoder.encode(["a ghost"])
    for parameter in encoder._model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(UnsupportedBackendError, match="sentence encoder returns NaN or infinity for 1 texts"):
        encoder.encode(["a ghost", "a fox"])


def test_it_is_calibrated_on_its_own_fingerprint(folder: Path) -> None:
    backend, encoder = backend_of(tiny_sd()), SentenceEncoder(str(folder))
    found = calibrate(backend, ["ghost"], ["a ghost"], ["a fox", "the van"], sentence=encoder)
    assert [(one.score, one.encoder) for one in found] == [
        ("direction", backend.fingerprint),
        ("paper", backend.fingerprint),
        ("semantic", encoder.fingerprint),
    ]


@pytest.mark.parametrize("source", ["nowhere", "owner/name", "owner/name@main", ""])
def test_what_could_change_unnoticed_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="a hub id with its commit"):
        SentenceEncoder(source)


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        SentenceEncoder(str(tmp_path))
