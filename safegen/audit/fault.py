"""What `verify` calls a fault."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One line, or one file, that is not as it was written.

    Attributes:
        file: Path of the segment, of its digests, or of the tombstones.
        seq: Number of the first record in question: the one that is missing, or the one that was changed. None where
            no record is in question (an unreadable file, a folder without segments).
        line: Line in the file, from 1; 0 for the file as a whole.
        message: What was expected and what was found.
    """

    file: str
    seq: int | None
    line: int
    message: str

    def __str__(self) -> str:
        """`file:line: seq N: message`."""
        return f"{self.file}:{self.line}: seq {'?' if self.seq is None else self.seq}: {self.message}"
