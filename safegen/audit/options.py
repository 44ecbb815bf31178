"""How a host may set up its audit log, beyond what the policy says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safegen.audit.digest import Digest
from safegen.audit.events import Record
from safegen.audit.signing import Signer
from safegen.errors import UsageError


def default_directory() -> Path:
    """Returns where audits go by default: `SAFEGEN_AUDIT_DIR`, or safegen/audit in the XDG state folder."""
    given = os.environ.get("SAFEGEN_AUDIT_DIR")
    if given:
        return Path(given)
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "safegen" / "audit"


Anchor = Callable[[Digest], None]
Redactor = Callable[[str], str]
Sink = Callable[[Record], None]


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """Signing, copies elsewhere, redaction and rotation.

    Attributes:
        signer: Signs the digests of each segment (`load_signer`). `apply_policy` takes this machine's where it is None;
            `AuditLog.open` then signs nothing.
        anchor: Gets each signed digest, to keep it where whoever can rewrite the log cannot reach: the only defence
            against the holder of the signing key. It is called while the log is locked and must not write to it. Where
            it raises, no further record is written until it has taken that digest.
        redact: Takes the personal parts out of a prompt, in a log with `text: redacted`. Where it raises, or returns no
            text, the text is dropped and the record says so.
        sinks: Get each record once it is in the log (`safegen.audit.otel.Telemetry`). They are copies: one that raises
            is reported to the logger "safegen", and the record stands.
        max_bytes: A new segment begins once one is this long.
        max_age: Or this old, in seconds.
        heartbeat_records: A digest is signed after this many records,
        heartbeat_seconds: and with the first record that comes this many seconds after the last digest. What was
            written since then can be cut off or forged without a digest to show it.
    """

    signer: Signer | None = None
    anchor: Anchor | None = None
    redact: Redactor | None = None
    sinks: tuple[Sink, ...] = ()
    max_bytes: int = 64 << 20
    max_age: float = 86_400.0
    heartbeat_records: int = 1000
    heartbeat_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be meant."""
        for name in ("max_bytes", "max_age", "heartbeat_records", "heartbeat_seconds"):
            if not getattr(self, name) > 0:
                raise UsageError(f"audit options: expected {name} above 0, found {getattr(self, name)}")
