"""The Ed25519 key behind the digests of a log.

Whoever holds it can rewrite the log and sign it again; only what an anchor put elsewhere shows that. Whoever verifies
needs the public key alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safegen.audit.keyfile import SECRET_BYTES, load_secret
from safegen.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ENV_SIGNING_KEY = "SAFEGEN_AUDIT_SIGNING_KEY"


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key for digests.

    Attributes:
        secret: The 32 bytes of an Ed25519 private key (RFC 8032); never shown by `repr`.
        path: The file it came from, or None; `AuditLog.open` refuses a key file that lies inside the log.
    """

    secret: bytes = field(repr=False)
    path: Path | None = None

    def __post_init__(self) -> None:
        """Refuses a secret of another length."""
        if len(self.secret) != SECRET_BYTES:
            raise UsageError(
                f"audit signing key: expected {SECRET_BYTES} bytes (an Ed25519 private key), found {len(self.secret)}"
            )

    @property
    def public_key(self) -> str:
        """The public key, as 64 hex digits: what `safegen audit verify --pubkey` takes."""
        return _private(self.secret).public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> str:
        """Returns the signature of `data`, as 128 hex digits."""
        return _private(self.secret).sign(data).hex()


def load_signer(path: Path | None = None) -> Signer:
    """Returns the signing key: of `path`, of `SAFEGEN_AUDIT_SIGNING_KEY`, or of this machine (`audit-signing.key`).

    Raises:
        UsageError: The variable or the file holds no key of 32 bytes.
        AuditError: The file cannot be read or created, or its group or others may read it.
    """
    return Signer(*load_secret(path, variable=ENV_SIGNING_KEY, name="audit-signing.key"))


def signed_by(public_key: str, signature: str, data: bytes) -> bool:
    """Tells whether `signature` is one of `data` by the holder of `public_key`; False where either is malformed."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), data)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_public_key(text: str) -> str:
    """Returns a public key in lower case.

    Raises:
        UsageError: It is not 64 hex digits.
    """
    text = text.strip().lower()
    if len(text) != 2 * SECRET_BYTES or any(c not in "0123456789abcdef" for c in text):
        raise UsageError(
            f"public key: expected {2 * SECRET_BYTES} hex digits, found {len(text)} characters; "
            "`safegen audit key` prints the one of this machine"
        )
    return text


@functools.lru_cache(maxsize=4)
def _private(secret: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(secret)
