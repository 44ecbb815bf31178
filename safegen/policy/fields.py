"""What the values of a policy document may be: names, categories, choices, dates."""

from __future__ import annotations

import re
from datetime import date
from enum import Enum
from functools import total_ordering
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError

from safegen.errors import did_you_mean
from safegen.policy.faults import UNKNOWN

Mode = Literal["enforce", "observe", "disabled"]
Action = Literal["erase", "refuse", "flag"]
OnUnknown = Literal["open", "refuse"]
OnMissing = Literal["refuse-prompts", "error", "flag"]
ScoreName = Literal["direction", "lexical", "paper", "semantic", "always"]
Guidance = Literal["both", "conditional"]
Task = Literal["txt2img", "img2img", "inpaint", "controlnet", "video"]

CATEGORIES = ("explicit", "artist-style", "ip-character", "object", "memorised", "custom")
"""The roots of the category tree; `explicit/nudity` is a branch of `explicit`."""
TASKS: tuple[Task, ...] = ("txt2img", "img2img", "inpaint", "controlnet", "video")

_KEBAB = r"[a-z0-9]+(-[a-z0-9]+)*"
_CATEGORY = rf"{_KEBAB}(/{_KEBAB}){{0,2}}"


class Strict(BaseModel):
    """Base of all document models: frozen, and unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@total_ordering
class Severity(Enum):
    """How bad it would be if the concept got through; ordered, so exit codes can ask for `>= HIGH`."""

    INFO = "info"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    def __lt__(self, other: object) -> bool:
        """Compares by rank: info < low < medium < high < critical."""
        if not isinstance(other, Severity):
            return NotImplemented
        ranks = list(Severity)
        return ranks.index(self) < ranks.index(other)


def spelled(pattern: str, words: str) -> AfterValidator:
    """Returns a validator of text that matches `pattern` in full; `words` say it in the message."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise PydanticCustomError("spelling", "expected {words}", {"words": words})
        return value

    return AfterValidator(check)


def _patterned(pattern: str) -> WithJsonSchema:
    """Returns the JSON Schema of text that `spelled` checks."""
    return WithJsonSchema({"type": "string", "pattern": f"^({pattern})$"})


def within(category: str, ancestor: str) -> bool:
    """Tells whether a category is `ancestor` or a branch of it: `explicit/nudity` is within `explicit`."""
    return category == ancestor or category.startswith(f"{ancestor}/")


def _check_category(value: str) -> str:
    root = value.split("/")[0]
    if root not in CATEGORIES:
        raise PydanticCustomError(
            UNKNOWN, "unknown category {found}.{hint}", {"found": repr(value), "hint": did_you_mean(root, CATEGORIES)}
        )
    if not re.fullmatch(_CATEGORY, value):
        raise PydanticCustomError("spelling", "expected a category (like explicit or explicit/nudity)")
    return value


def _check_date(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        try:
            return date.fromisoformat(value)
        except ValueError:
            pass
    if type(value) is date:
        return value
    raise PydanticCustomError("day", "expected a day that exists (like 2027-03-31)")


def _check_words(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("blank", "expected some words")
    return value


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Kebab = Annotated[str, spelled(_KEBAB, "kebab case (like artist-styles)"), _patterned(_KEBAB)]
Category = Annotated[
    str,
    AfterValidator(_check_category),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(CATEGORIES)},
                {"type": "string", "pattern": f"^({'|'.join(CATEGORIES)})(/{_KEBAB}){{1,2}}$"},
            ]
        }
    ),
]
ConceptName = Annotated[
    str,
    spelled(rf"{_KEBAB}|{_CATEGORY}/\*", "a concept id (like van-gogh) or a category (like artist-style/*)"),
    _patterned(rf"{_KEBAB}|{_CATEGORY}/\*"),
]
RuleName = Annotated[
    str,
    spelled(rf"{_KEBAB}(/{_KEBAB})?", "a rule id (like nudity), or <rule id>/<concept id>"),
    _patterned(rf"{_KEBAB}(/{_KEBAB})?"),
]
ContextKey = Annotated[
    str, spelled(r"[a-z][a-z0-9_-]{0,63}", "a name (like tenant)"), _patterned(r"[a-z][a-z0-9_-]{0,63}")
]
Version = Annotated[
    str,
    spelled(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", "a semantic version (like 1.0.0)"),
    _patterned(r"[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]+)?"),
]
Words = Annotated[str, AfterValidator(_check_words), WithJsonSchema({"type": "string", "pattern": r"\S"})]
Day = Annotated[
    date, BeforeValidator(_check_date), WithJsonSchema({"type": "string", "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"})
]


class _OrOne:
    """Lets the JSON Schema of a list also take one entry that stands without a list."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Returns the schema of either."""
        listed = handler(core)
        return {"anyOf": [listed["items"], listed]}


T = TypeVar("T")
Listed = Annotated[tuple[T, ...], BeforeValidator(_listed), _OrOne()]
"""A list; a single text may be written without one."""
OneOrMore = Annotated[tuple[T, ...], BeforeValidator(_listed), Field(min_length=1), _OrOne()]
"""A list with at least one entry; a single text may be written without one."""
