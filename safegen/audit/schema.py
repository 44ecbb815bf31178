"""The schema `safegen.audit/1` applied to lines: what every line must hold, and the same as a published JSON Schema."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from safegen.audit.events import REQUIRED, Record
from safegen.audit.plain import Plain
from safegen.errors import AuditWriteError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import CoreSchema, SchemaValidator

SCHEMA_ID = "https://safegen.dev/schema/audit/1.json"


def missing_fields(data: Mapping[str, Any]) -> list[str]:
    """Lists what the kind of a record needs and it lacks; empty for a sound record and for a kind not known here.

    Args:
        data: A record as JSON object, of the right types (`check_line`).
    """
    kind = data["kind"]
    missing = [name for name in REQUIRED.get(kind, ()) if data.get(name) is None]
    if kind in ("gated", "generated", "refused"):
        for index, membrane in enumerate(cast(Sequence[Mapping[str, Any]], data.get("membranes") or ())):
            if membrane.get("permeability") is not None and membrane.get("opened") is not None:
                continue
            missing += [
                f"membranes[{index}].{name}" for name in ("permeability", "opened") if membrane.get(name) is None
            ]
    # A prompt can be absent only where the host passed embeddings instead of one.
    if kind == "gated" and data.get("prompt") is None and "embeds_only" not in (data.get("inputs") or ()):
        missing.append("prompt")
    return missing


def check_line(line: bytes) -> None:
    """Checks that one line (without its newline) has every field of a `Record` in its type; says nothing of the chain.

    It builds no objects, and is many times faster than `parse_record`.

    Raises:
        ValueError: One line of text that names each wrong field.
    """
    from pydantic_core import ValidationError

    try:
        _validator().validate_json(line)
    except ValidationError as error:
        raise ValueError(_faults(error.errors())) from error


def check_values(data: Mapping[str, Any]) -> None:
    """Checks a record as JSON object, as `check_line` does its line.

    Raises:
        ValueError: One line of text that names each wrong field.
    """
    from pydantic_core import ValidationError

    try:
        _validator().validate_python(data)
    except ValidationError as error:
        raise ValueError(_faults(error.errors())) from error


def parse_record(line: bytes) -> Record:
    """Reads one line (without its newline) as a `Record`; says nothing about the chain.

    Raises:
        ValueError: One line of text that names each wrong field.
    """
    from pydantic import ValidationError

    try:
        return _adapter().validate_json(line, strict=True)
    except ValidationError as error:
        raise ValueError(_faults(error.errors())) from error
    except AuditWriteError as error:
        raise ValueError(str(error)) from error


def _faults(errors: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in errors)


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of one line of a log; fields that it does not name are allowed.

    It is published as docs/reference/audit.schema.json; `make schema` renews that.
    """
    schema = _adapter().json_schema()
    kinds = [
        {
            "if": {"properties": {"kind": {"const": kind}}},
            "then": {"required": list(fields)},
        }
        for kind, fields in REQUIRED.items()
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema, "allOf": kinds}


@functools.cache
def _adapter() -> TypeAdapter[Record]:
    # Imported here, so that importing safegen costs nothing.
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


@functools.cache
def _validator() -> SchemaValidator:
    from pydantic_core import SchemaValidator

    return SchemaValidator(_core_schema(Record))


def _core_schema(kind: Any) -> CoreSchema:
    """Returns the schema of a field's JSON form: what `_adapter` reads, without building the objects."""
    from pydantic_core import core_schema

    if kind in (str, int, float, bool):
        made = {
            str: core_schema.str_schema,
            int: core_schema.int_schema,
            float: core_schema.float_schema,
            bool: core_schema.bool_schema,
        }
        return made[kind](strict=True)
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return core_schema.nullable_schema(_core_schema(parts[0]))
    if typing.get_origin(kind) is tuple:
        return core_schema.list_schema(_core_schema(parts[0]))
    assert issubclass(kind, Plain), kind
    fields = {
        name: core_schema.typed_dict_field(_core_schema(hint), required=not isinstance(hint, types.UnionType))
        for name, hint in typing.get_type_hints(kind).items()
    }
    return core_schema.typed_dict_schema(fields)
