from __future__ import annotations

import base64
import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from safegen.audit import HmacKey, load_key
from safegen.errors import AuditError, UsageError

SECRET = bytes(range(100, 132))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("SAFEGEN_AUDIT_KEY", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_default_file_is_made_once_and_private(home: Path) -> None:
    key = load_key()
    assert key.path is not None
    assert key.path == home / ".config" / "safegen" / "audit.key"
    assert len(key.secret) == 32
    assert stat.S_IMODE(key.path.stat().st_mode) == 0o600
    assert load_key() == key
    assert [path.name for path in key.path.parent.iterdir()] == ["audit.key"]


def test_xdg_config_home_is_honoured_where_it_is_absolute(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "conf"))
    assert load_key().path == home / "conf" / "safegen" / "audit.key"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert load_key().path == home / ".config" / "safegen" / "audit.key"


def test_threads_that_start_together_get_one_key() -> None:
    keys: list[HmacKey] = []
    threads = [threading.Thread(target=lambda: keys.append(load_key())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len({key.secret for key in keys}) == 1


@pytest.mark.parametrize(
    "text",
    [
        SECRET.hex(),
        SECRET.hex().upper() + "\n",
        base64.b64encode(SECRET).decode(),
        base64.urlsafe_b64encode(SECRET).decode().rstrip("="),
    ],
)
def test_the_variable_holds_hex_or_base64_and_wins_over_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SAFEGEN_AUDIT_KEY", text)
    assert load_key() == HmacKey(SECRET)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("text", ["", "not a key", "abcd", "é" * 40, "a" * 33])
def test_a_variable_that_holds_no_key_is_refused_without_showing_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SAFEGEN_AUDIT_KEY", text)
    with pytest.raises(UsageError, match="key") as caught:
        load_key()
    assert not text or text not in str(caught.value)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_can_reach_is_refused(home: Path, mode: int) -> None:
    path = home / "audit.key"
    path.write_text(SECRET.hex())
    path.chmod(mode)
    with pytest.raises(AuditError, match="chmod 600"):
        load_key(path)
    path.chmod(0o600)
    assert load_key(path) == HmacKey(SECRET, path)


def test_a_place_that_cannot_hold_a_key_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = home / "file"
    blocker.write_text("x")
    with pytest.raises(AuditError, match="SAFEGEN_AUDIT_KEY"):
        load_key(blocker / "audit.key")
    with pytest.raises(AuditError, match="directory"):
        load_key(home)
    os.mkfifo(home / "fifo", 0o600)
    holder = os.open(home / "fifo", os.O_RDWR)  # so that opening it for reading does not wait
    with pytest.raises(AuditError, match="regular file"):
        load_key(home / "fifo")
    os.close(holder)


def test_the_secret_is_never_shown() -> None:
    key = HmacKey(SECRET)
    assert repr(key) == "HmacKey(path=None)"
    assert key.key_id == hashlib.sha256(SECRET).hexdigest()[:8]
