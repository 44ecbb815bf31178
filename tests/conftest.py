"""Shared fixtures: tiny real pipelines, a key for audits, and no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors gain nothing from a second thread, and two threads that wait for each other take twice as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from safegen.audit import HmacKey


@pytest.fixture(scope="session")
def audit_key() -> HmacKey:
    """A fixed key, so that no test touches the user's own."""
    return HmacKey(b"0123456789abcdef0123456789abcdef")


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the default audit folder and key of every test in its own folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("SAFEGEN_AUDIT_DIR", raising=False)
    monkeypatch.delenv("SAFEGEN_AUDIT_KEY", raising=False)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A tiny pipeline, shared by the tests of a module."""
    from tiny import tiny_sd  # here, so that tests without a model start without torch

    return tiny_sd()


@pytest.fixture
def untouched(pipe: Any) -> Iterator[None]:
    """Proves that a test leaves the shared pipeline as it was, bit for bit."""
    from tiny import attributes, same_state, state_of

    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    before, kept = state_of(*parts), attributes(pipe)
    yield
    assert same_state(before, state_of(*parts)), "the test left something behind on the pipeline"
    assert attributes(pipe) == kept
