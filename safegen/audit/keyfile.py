"""Secrets of this machine: from an environment variable, or from a file that is kept apart from the log."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import secrets
import stat
import string
from pathlib import Path

from safegen.errors import AuditError, UsageError

SECRET_BYTES = 32


def load_secret(path: Path | None, *, variable: str, name: str) -> tuple[bytes, Path | None]:
    """Returns a secret, and the file that it came from.

    Without `path`, the environment variable comes first, then the default file, `$XDG_CONFIG_HOME/safegen/<name>`
    (`~/.config` where that variable is not set). A file that does not exist is created with mode 0600 and 32 random
    bytes. Both hold the secret as text: hexadecimal where every character is a hex digit, base64 (standard or URL-safe)
    otherwise.

    Raises:
        UsageError: The variable or the file holds neither.
        AuditError: The file cannot be read or created, or its group or others may read it.
    """
    text = os.environ.get(variable)
    if path is None and text is not None:
        return _decode(text, f"environment variable {variable}"), None
    try:
        path = path or _default_folder() / name
        if not path.exists():
            _create(path)
        return _read(path), path
    except RuntimeError as error:  # a container user without a home
        raise AuditError(f"no place for the audit key: {error} Set {variable} to a key in hex or base64") from error
    except OSError as error:
        raise AuditError(
            f"{path}: cannot use the audit key file: {error.strerror}; make the folder writable, "
            f"or set {variable} to a key in hex or base64"
        ) from error


def _default_folder() -> Path:
    # The XDG base directory specification: a relative or empty value is to be ignored.
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".config") / "safegen"


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise AuditError(f"{path}: expected a regular file as audit key")
        if mode & 0o077:
            raise AuditError(
                f"{path}: others may read the audit key (mode {stat.S_IMODE(mode):04o}, expected 0600); "
                f"run: chmod 600 {path}, and replace the key if anyone may have read it"
            )
        return _decode(file.read(4096).decode("ascii", "replace"), str(path))


def _create(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_hex(SECRET_BYTES).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, never replaces: of two processes that start together both end up with one key.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def _decode(text: str, where: str) -> bytes:
    text = text.strip()
    try:
        if text and all(char in string.hexdigits for char in text):
            return bytes.fromhex(text)
        plain = text.replace("-", "+").replace("_", "/").rstrip("=")
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        # The text itself is never shown: it may be most of a real key.
        raise UsageError(f"{where}: expected a key in hex or base64, found neither ({len(text)} characters)") from error
