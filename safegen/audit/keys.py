"""The key behind the prompt HMACs: from the environment, or from a file kept apart from the log.

A plain hash of a prompt can be guessed; an HMAC cannot, as long as the key is not stored with the log. Whoever holds
the key can answer "did this prompt appear?"; destroying it ends that. The HMACs remain personal data.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from safegen.audit.keyfile import SECRET_BYTES, load_secret
from safegen.errors import UsageError

ENV_KEY = "SAFEGEN_AUDIT_KEY"
ALGORITHM = "HMAC-SHA256"
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
                f'make one with: python -c "import secrets; print(secrets.token_hex({SECRET_BYTES}))"'
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
    """Returns the key of prompt HMACs: of `path`, of `SAFEGEN_AUDIT_KEY`, or of this machine (`audit.key`, made once).

    Raises:
        UsageError: The variable or the file holds no key of at least 16 bytes.
        AuditError: The file cannot be read or created, or its group or others may read it.
    """
    return HmacKey(*load_secret(path, variable=ENV_KEY, name="audit.key"))
