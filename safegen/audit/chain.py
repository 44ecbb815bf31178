"""The bytes of the log: canonical JSON, the hash chain, identifiers and time stamps.

A record is one line: its RFC 8785 (JCS) form and a newline. `hash` is the sha256, in lower-case hex, of the RFC 8785
form of the record without `hash`; `prev` is the `hash` of the record before it, or `GENESIS` for the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

import rfc8785

SCHEMA_VERSION = 1
GENESIS = hashlib.sha256(b"safegen.audit/1 genesis").hexdigest()
MAX_RECORD_BYTES = 1 << 20  # one line with its newline: what bounds the memory of a reader
MAX_INT = 2**53 - 1  # beyond it JSON numbers are not exact, and RFC 8785 refuses integers


# What Python's encoder writes otherwise than RFC 8785: `1.0` for `1`, `1e-05` for `0.00001`.
_WHOLE = (".0,", ".0}", ".0]")
_EXPONENT = re.compile(r"e[-+][0-9]+[,\]}]")
_FIRST_SORTED_APART = "\ue000"  # below it, code points and the UTF-16 units that RFC 8785 sorts keys by agree
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")).encode


def canonical(value: Mapping[str, object]) -> bytes:
    """Returns the RFC 8785 bytes of a JSON object.

    Most records come out of the encoder of the standard library in that form, thirty times faster than out of rfc8785;
    whatever might not (text that looks alike included) goes to rfc8785.

    Args:
        value: Its integers lie within ±(2**53 - 1): `Plain` and `parse_line` see to that.

    Raises:
        ValueError: Where it holds NaN, Inf, a lone surrogate or a non-JSON value.
    """
    try:
        text = _encode(value)
    except TypeError:  # not JSON: rfc8785 says so
        return rfc8785.dumps(cast(Any, value))
    unlike = _EXPONENT.search(text) or any(piece in text for piece in _WHOLE)
    if unlike or not (text.isascii() or max(text) < _FIRST_SORTED_APART):
        return rfc8785.dumps(cast(Any, value))
    return text.encode()


def sealed(record: Mapping[str, object]) -> tuple[str, bytes]:
    """Returns the hash of a record without `hash`, and the canonical form of the record with it."""
    before = canonical({key: value for key, value in record.items() if key < "hash"})[:-1]
    after = canonical({key: value for key, value in record.items() if key > "hash"})[1:]
    digest = hashlib.sha256(before + b"," + after).hexdigest()
    return digest, b'%s,"hash":"%s",%s' % (before, digest.encode(), after)


def record_hash(record: Mapping[str, object]) -> str:
    """Returns the sha256 (64 hex digits) of a record, whether or not it carries its `hash` already."""
    return hashlib.sha256(canonical({key: value for key, value in record.items() if key != "hash"})).hexdigest()


def line_hash(line: bytes, digest: str) -> str:
    """Returns what `record_hash` returns for a canonical line that carries `digest` as its hash, without parsing it."""
    return hashlib.sha256(line.replace(b'"hash":"%s",' % digest.encode(), b"", 1)).hexdigest()


def parse_line(line: bytes) -> dict[str, object]:
    """Reads one line (without its newline) as a JSON object in canonical form.

    The canonical form is demanded because `1E3` for `1e3`, or a needless escape, would otherwise change bytes of the
    file without changing any hash.

    Raises:
        ValueError: Says what the line is instead.
    """
    if len(line) >= MAX_RECORD_BYTES:
        raise ValueError(f"expected a line of at most {MAX_RECORD_BYTES} bytes, found more")
    try:
        data: object = json.loads(
            line.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_exact_int,
            parse_constant=_refuse_constant,
        )
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, found {type(data).__name__}")
        record = cast(dict[str, object], data)
        same = canonical(record) == line
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not same:
        raise ValueError("not in canonical form (RFC 8785): bytes were changed")
    return record


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return data


def _exact_int(digits: str) -> int | float:
    # RFC 8785 writes the float 1e20 without exponent; Python would read it back as an integer that JCS refuses.
    number = float(digits)
    return int(digits) if abs(number) <= MAX_INT else number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def utc_now() -> str:
    """Returns the time of the wall clock, UTC, ISO 8601 with milliseconds: `2027-01-05T10:00:00.123Z`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_ts(text: str) -> datetime:
    """Reads a time stamp that `utc_now` wrote.

    Raises:
        ValueError: Where it has another form.
    """
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)


def uuid7() -> str:
    """Returns a new UUID of version 7 (RFC 9562): 48 bits of Unix milliseconds, then 74 random bits."""
    stamp = (time.time_ns() // 1_000_000) & (2**48 - 1)
    tail = int.from_bytes(os.urandom(10), "big")
    number = stamp << 80 | 0x7 << 76 | (tail >> 68) << 64 | 0b10 << 62 | (tail & (2**62 - 1))
    return str(uuid.UUID(int=number))
