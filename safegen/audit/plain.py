"""Plain values: what a record may hold, and its JSON object.

Floats are finite and rounded to 6 digits, so that every platform writes the same bytes; lists become tuples; lone
surrogates become U+FFFD. Anything else, such as a tensor, is refused: the audit layer gets finished values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import cast

from safegen.audit.chain import MAX_INT
from safegen.errors import AuditWriteError


@dataclass(frozen=True, slots=True)
class Plain:
    """Base of all records: replaces each value by its plain form.

    Raises:
        AuditWriteError: Names the field that holds NaN, Inf, a tensor or another value that is not plain.
    """

    def __post_init__(self) -> None:
        """Replaces the values."""
        for name in _names(type(self)):
            value = getattr(self, name)
            if value is None or value is True or value is False or isinstance(value, Plain):
                continue
            if type(value) is str and value.isascii():
                continue
            object.__setattr__(self, name, _plain(value, f"{type(self).__name__}.{name}"))


@functools.cache
def _names(kind: type[Plain]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def as_dict(record: Plain) -> dict[str, object]:
    """Returns the JSON object of a record: fields that are None are left out, whole numbers are integers."""
    values: dict[str, object] = {}
    for name in _names(type(record)):
        value = getattr(record, name)
        if value is None:
            continue
        kind = type(value)
        if kind is str or kind is bool or kind is int:
            values[name] = value
        elif kind is float:  # RFC 8785 writes 1.0 as 1
            values[name] = int(value) if value.is_integer() and abs(value) <= MAX_INT else value
        elif kind is tuple:
            values[name] = [as_dict(item) if isinstance(item, Plain) else item for item in value]
        else:
            values[name] = as_dict(value)
    return values


def _plain(value: object, where: str) -> object:
    if value is None or isinstance(value, (bool, Plain)):
        return value
    if isinstance(value, str):
        return str.__str__(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            raise AuditWriteError(f"{where}: {value} is beyond ±(2**53 - 1), which JSON cannot carry exactly")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise AuditWriteError(f"{where}: expected a finite number, found {value}; the value it records is broken")
        return round(float(value), 6) + 0.0  # + 0.0 turns -0.0 into 0.0
    if isinstance(value, (list, tuple)):
        items = cast(list[object] | tuple[object, ...], value)
        return tuple(_plain(item, f"{where}[{index}]") for index, item in enumerate(items))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise AuditWriteError(
        f"{where}: expected a plain Python value, found {kind}; convert it with float(), int() or str()"
    )
