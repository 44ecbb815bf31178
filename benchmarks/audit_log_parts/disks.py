"""Disks that refuse: each function opens a log where the system will not let it be written, and says what came of it.

python -m audit_log_parts.disks FOLDER full|limit|readonly     prints `{"how": …, "refused": …, "kept": …}`
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from audit_log_parts.writer import KEY, SIGNER, write_record
from safegen.audit import AuditLog, AuditOptions, verify
from safegen.errors import AuditWriteError

NOBODY = 65534


def _fill(folder: Path) -> tuple[str, int]:
    """Writes until it is refused; returns the refusal, and how many records were acknowledged."""
    kept, log, refusal = 0, None, ""
    try:
        log = AuditLog.open(folder, key=KEY, options=AuditOptions(signer=SIGNER))
        for turn in range(2000):
            write_record(log, turn)
            kept += 1
    except AuditWriteError as error:
        refusal = str(error)
    if log is not None:
        log.close()
    return refusal, kept


def full(folder: Path) -> dict[str, object]:
    """A small file system in memory that fills up; a limit on the size of files where none can be mounted."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        return limit(folder)
    try:
        refusal, kept = _fill(folder / "log")
        report = verify(folder / "log", public_keys=[SIGNER.public_key])
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    return {"how": "tmpfs of 300 kB", "refused": refusal, "kept": kept, "found": report.records - 1, "ok": report.ok}


def limit(folder: Path) -> dict[str, object]:
    """A limit on the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    refusal, kept = _fill(folder / "log")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    report = verify(folder / "log", public_keys=[SIGNER.public_key])
    return {"how": "RLIMIT_FSIZE", "refused": refusal, "kept": kept, "found": report.records - 1, "ok": report.ok}


def readonly(folder: Path) -> dict[str, object]:
    """A folder without write permission, as a user whom that stops: root gives up being root for it."""
    place = folder / "closed"
    place.mkdir()
    place.chmod(0o555)
    how = "mode 0555"
    if os.geteuid() == 0:
        for parent in (folder, *folder.parents):
            if parent.stat().st_mode & 0o005 != 0o005:
                parent.chmod(parent.stat().st_mode | 0o005)
                break
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        how = f"mode 0555, as user {NOBODY}"
    refusal, kept = _fill(place)
    return {"how": how, "refused": refusal, "kept": kept, "found": 0, "ok": True}


if __name__ == "__main__":
    print(json.dumps({"full": full, "limit": limit, "readonly": readonly}[sys.argv[2]](Path(sys.argv[1]))))
