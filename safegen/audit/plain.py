"""Plain values: what a record may hold, and its JSON object.

Floats are finite and rounded to 6 digits, so that every platform writes the same bytes; lists become tuples; lone
surrogates become U+FFFD. Anything else, such as a tensor, is refused: the audit layer gets finished values.
"""

from __future__ import annotations

import dataclasses
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
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name), f"{type(self).__name__}.{field.name}")
            object.__setattr__(self, field.name, value)


def as_dict(record: Plain) -> dict[str, object]:
    """Returns the JSON object of a record: fields that are None are left out, tuples stay lists."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: _json(value) for name, value in values.items() if value is not None}


def _json(value: object) -> object:
    if isinstance(value, Plain):
        return as_dict(value)
    if isinstance(value, tuple):
        return [_json(item) for item in cast(tuple[object, ...], value)]
    return value


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
