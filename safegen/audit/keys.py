"""The key behind the prompt HMACs: from the environment, or from a file kept apart from the log.

A plain hash of a prompt can be guessed; an HMAC cannot, as long as the key is not stored with the log. Whoever holds
the key can answer "did this prompt appear?"; destroying it ends that. The HMACs remain personal data.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import string
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from safegen.errors import AuditError, UsageError

ENV_KEY = "SAFEGEN_AUDIT_KEY"
ALGORITHM = "HMAC-SHA256"
KEY_BYTES = 32
MIN_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class HmacKey:
    """A secret for prompt HMACs.

    Attributes:
        secret: At least 16 bytes; never shown by `repr`.
        path: The file it came from, or None; `AuditLog.open` refuses a key file that lies inside the log.
    """

    secret: bytes = field(repr=False)
    path: Path | None = None

    def __post_init__(self) -> None:
        """Refuses a secret that is too short to protect anything."""
        if len(self.secret) < MIN_KEY_BYTES:
            raise UsageError(
                f"audit key: expected at least {MIN_KEY_BYTES} bytes, found {len(self.secret)}; "
                f'make one with: python -c "import secrets; print(secrets.token_hex({KEY_BYTES}))"'
            )

    @property
    def key_id(self) -> str:
        """The first 8 hex digits of the sha256 of the secret."""
        return hashlib.sha256(self.secret).hexdigest()[:8]

    def hmac(self, text: str) -> str:
        """Returns HMAC-SHA256(secret, UTF-8 of NFC(text)) as 64 hex digits; lone surrogates count as they are."""
        data = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
        return hmac.new(self.secret, data, hashlib.sha256).hexdigest()


def load_key(path: Path | None = None) -> HmacKey:
    """Returns the audit key of this machine.

    Without `path`, the environment variable `SAFEGEN_AUDIT_KEY` comes first, then the default file,
    `$XDG_CONFIG_HOME/safegen/audit.key` (`~/.config` where that variable is not set). A file that does not exist is
    created with mode 0600 and 32 random bytes. Both hold the key as text: hexadecimal where every character is a hex
    digit, base64 (standard or URL-safe) otherwise.

    Raises:
        UsageError: The variable or the file holds no key of at least 16 bytes.
        AuditError: The file cannot be read or created, or its group or others may read it.
    """
    text = os.environ.get(ENV_KEY)
    if path is None and text is not None:
        return HmacKey(_decode(text, f"environment variable {ENV_KEY}"))
    try:
        path = path or _default_path()
        if not path.exists():
            _create(path)
        return HmacKey(_read(path), path)
    except RuntimeError as error:  # a container user without a home
        raise AuditError(f"no place for the audit key: {error} Set {ENV_KEY} to a key in hex or base64") from error
    except OSError as error:
        raise AuditError(
            f"{path}: cannot use the audit key file: {error.strerror}; make the folder writable, "
            f"or set {ENV_KEY} to a key in hex or base64"
        ) from error


def _default_path() -> Path:
    # The XDG base directory specification: a relative or empty value is to be ignored.
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".config") / "safegen" / "audit.key"


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
            file.write(secrets.token_hex(KEY_BYTES).encode() + b"\n")
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
