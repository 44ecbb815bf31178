"""Writing a calibration into a membrane's file and card, without touching a bit of its tensors."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safegen.errors import FormatError
from safegen.files import write_atomically
from safegen.membrane.file import MAX_HEADER_BYTES, read_with_digest
from safegen.transport.calibration import METADATA_KEY

HEADING = "## Calibration"
_SECTION = re.compile(rf"^{HEADING}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def write_calibration(path: Path, calibration: str, section: str) -> str:
    """Puts a calibration into a membrane file, and into `card.md` beside it where there is one.

    The tensors and all other metadata stay as they are, bit for bit. Each file is replaced atomically.

    Args:
        path: A membrane file.
        calibration: The text of the metadata.
        section: The section of the card that says the same to people, from its heading on.

    Returns:
        The sha256 of the file as it is now, in hex.

    Raises:
        MembraneNotFoundError, FormatError, ShapeMismatchError: See `read_membrane`.
        FormatError: The header would grow beyond what a reader accepts.
    """
    _, before = read_with_digest(path)  # refuses a damaged or hostile file before anything is made from it
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {**header.get("__metadata__", {}), METADATA_KEY: calibration}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: with one more calibration its header would have {len(text)} bytes; expected at most "
            f"{MAX_HEADER_BYTES}; calibrate a copy without those of other encoders"
        )
    written = len(text).to_bytes(8, "little") + text + content[8 + length :]
    write_atomically(path, lambda draft: draft.write_bytes(written))
    digest = hashlib.sha256(written).hexdigest()
    card = path.with_name("card.md")
    if card.is_file():
        text = with_section(card.read_text("utf-8").replace(before, digest), section)
        write_atomically(card, lambda draft: draft.write_bytes(text.encode()))
    return digest


def with_section(card: str, section: str) -> str:
    """Returns a card's text with a calibration in it, in place of an earlier one or at its end."""
    section = section.rstrip("\n") + "\n"
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section + "\n", card, count=1).rstrip("\n") + "\n"
    return f"{card.rstrip()}\n\n{section}"
