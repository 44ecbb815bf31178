"""Schema faults in the words of the document's author: where, what was expected, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from safegen.errors import Problem, did_you_mean
from safegen.policy.document import Document, Loc

M = TypeVar("M", bound=BaseModel)

CONSISTENCY = "consistency"
"""Error type of faults between fields, which the loader reports itself with their positions."""
UNKNOWN = "unknown"
"""Error type of values that are none of a set; the message says all, with a suggestion."""


def validate(model: type[M], document: Document) -> tuple[M | None, list[Problem]]:
    """Validates a document against a model.

    Args:
        model: The pydantic model of the whole document.
        document: The parsed document.

    Returns:
        The instance, or None, and the faults found: those of the model, and words that YAML 1.1 reads as a switch.
        Faults between fields leave both empty.
    """
    if not isinstance(document.value, dict):
        return None, [document.problem((), f"expected keys and values, found {_shown(document.value)}")]
    instance: M | None = None
    faults: list[Problem] = []
    try:
        instance = model.model_validate(document.value)
    except ValidationError as error:
        faults = [_problem(model, document, fault) for fault in error.errors(include_url=False) if _counts(fault)]
    told = {fault.where for fault in faults}
    text = (
        "yes, no, on and off without quotes are true or false to YAML 1.1 tools; quote the word, or write true or false"
    )
    faults += [Problem(str(place), text) for place in document.switches.values() if str(place) not in told]
    return instance, faults


def in_document_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Returns problems sorted by line and column, each once; those of several files in the order of their files."""
    found = list(dict.fromkeys(problems))
    files = list(dict.fromkeys(problem.where.rsplit(":", 2)[0] for problem in found))

    def place(problem: Problem) -> tuple[int, int, int]:
        source, line, column = problem.where.rsplit(":", 2)
        return files.index(source), int(line), int(column)

    return tuple(sorted(found, key=place))


def _counts(fault: ErrorDetails) -> bool:
    # pydantic counts the entries that are left after validation: a list of faulty entries is too short for it.
    emptied = fault["type"] == "too_short" and bool(fault["input"])
    return fault["type"] != CONSISTENCY and not emptied


def _problem(model: type[BaseModel], document: Document, fault: ErrorDetails) -> Problem:
    loc = tuple(fault["loc"])
    if loc and loc[-1] == "[key]":  # pydantic's way to say that the key is at fault, not its value
        message = f"{loc[-3]}: {_expectation(fault)}; found {_shown(fault['input'])}"
        return document.problem(loc[:-1], message, key=True)
    kind, found = fault["type"], fault["input"]
    name = str(loc[-1]) if loc else "document"
    if kind == "extra_forbidden":
        return document.problem(loc, f"unknown key {name!r}.{did_you_mean(name, _fields(model, loc[:-1]))}", key=True)
    if kind == UNKNOWN:
        return document.problem(loc, fault["msg"])
    if kind == "missing":
        return document.problem(loc, f"missing key {name!r}")
    if isinstance(loc[-1] if loc else None, int):  # an entry of a list goes by the name of the list
        name = f"{loc[-2]}[{loc[-1]}]"
    choices = _choices(model, loc)
    if choices and kind in ("literal_error", "enum"):
        if isinstance(found, str):
            return document.problem(loc, f"unknown {name} {found!r}.{did_you_mean(found, choices)}")
        return document.problem(loc, f"{name}: expected one of {', '.join(choices)}; found {_shown(found)}")
    return document.problem(loc, f"{name}: {_expectation(fault)}; found {_shown(found)}")


def _expectation(fault: ErrorDetails) -> str:
    kind, found = fault["type"], fault["input"]
    if kind == "string_type" and isinstance(found, int | float) and not isinstance(found, bool):
        return "expected text (put numbers in quotes)"
    plain = {
        "string_type": "expected text",
        "model_type": "expected keys and values",
        "model_attributes_type": "expected keys and values",
        "dict_type": "expected keys and values",
        "tuple_type": "expected a list",
        "too_short": "expected at least one entry",
        "too_long": f"expected at most {fault.get('ctx', {}).get('max_length')} entries",
        "bool_type": "expected true or false",
        "float_type": "expected a number",
    }
    return plain.get(kind, fault["msg"].replace("Input should be", "expected", 1).replace("Value error, ", "", 1))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _annotation(model: type[BaseModel], loc: Loc) -> Any:
    """Returns the type annotation of the field at `loc`, or None off the schema."""
    annotation: Any = model
    for step in loc:
        inner = _model_in(annotation)
        if isinstance(step, int):
            continue  # an entry of a list: the entry type is found inside the list's annotation
        if inner is None or step not in inner.model_fields:
            return None
        annotation = inner.model_fields[step].annotation
    return annotation


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _fields(model: type[BaseModel], loc: Loc) -> tuple[str, ...]:
    inner = _model_in(_annotation(model, loc))
    return tuple(inner.model_fields) if inner is not None else ()


def _choices(model: type[BaseModel], loc: Loc) -> tuple[str, ...]:
    return _named(_annotation(model, loc))


def _named(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(str(choice) for choice in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(str(member.value) for member in annotation)
    return tuple(name for part in get_args(annotation) for name in _named(part))
