"""`safegen audit verify` and `safegen audit key`: checks an audit log, and the key to check it with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from safegen.cli import options
from safegen.cli.render import say, show, show_facts, show_json
from safegen.errors import AuditChainError

EXAMPLE = "Example: safegen audit verify safegen-demo/audit"
KEY_EXAMPLE = "Example: safegen audit key"


def verify(
    log: options.Log,
    pubkey: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="A public key that may have signed (64 hex digits, from `safegen audit key`); may be given several "
            "times. What none of them signed is a fault.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check an audit log: exit code 0 if no record was changed, removed or moved, 4 otherwise."""
    from safegen.audit import verify as verify_log
    from safegen.audit.signing import check_public_key

    keys = [check_public_key(key) for key in pubkey or ()]
    report = verify_log(log, public_keys=keys)
    if as_json:
        show_json({"ok": report.ok, **asdict(report)})
    else:
        show(str(report))
    if report.signers and not keys:
        say(
            "any key was accepted: give --pubkey to check who signed (`safegen audit key` on the machine that wrote it)"
        )
    if not report.ok:
        more = f" (and {report.fault_count - 1} more)" if report.fault_count > 1 else ""
        raise AuditChainError(f"{log}: not as it was written: {report.faults[0]}{more}", report.faults[0].seq)


def key(
    signing_key: options.SigningKey = None,
    hmac_key: options.HmacKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the public key that this machine signs audit logs with, and the id of its key for prompt digests."""
    from safegen.audit import load_key, load_signer

    signer, digests = load_signer(signing_key), load_key(hmac_key)
    facts = {
        "public_key": signer.public_key,
        "signing_key_file": str(signer.path) if signer.path else "environment",
        "hmac_key_id": digests.key_id,
        "hmac_key_file": str(digests.path) if digests.path else "environment",
    }
    if as_json:
        show_json(facts)
    else:
        show_facts(facts)
