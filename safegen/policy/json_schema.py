"""The published JSON Schema of policy files, which editors complete from.

`policies/schema/` holds it in two drafts: 2020-12, and draft-07 for yaml-language-server, which knows nothing newer.
Rewrite both with `python -m safegen.policy.json_schema` after a change of the models; a test says when they are stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from safegen.policy import schema as schema_module
from safegen.policy.fields import Strict
from safegen.policy.schema import Policy
from safegen.resources import shipped

Draft = Literal["2020-12", "draft-07"]
DRAFTS: dict[Draft, str] = {
    "2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft-07": "http://json-schema.org/draft-07/schema#",
}
_NEEDED = {"Rule": ["id"], "PolicyException": ["id"]}  # in a policy that extends another, which states the rest


def json_schema(draft: Draft = "2020-12") -> dict[str, Any]:
    """Returns the JSON Schema of a policy file.

    It describes one file: where a policy extends another, its rules may leave out what they inherit. What only the
    loader can know (concepts of the catalogue, what is stricter) is not in it.

    Args:
        draft: Which draft of JSON Schema.
    """
    schema = Policy.model_json_schema()
    definitions = cast("dict[str, dict[str, Any]]", schema["$defs"])
    found = vars(schema_module).items()
    models = {name: part for name, part in found if isinstance(part, type) and issubclass(part, Strict)}
    for name, part in ((Policy.__name__, schema), *definitions.items()):
        if name in models:
            _describe(part, models[name])
    complete = {name: list(definitions[name]["required"]) for name in _NEEDED}
    for name, needed in _NEEDED.items():
        definitions[name]["required"] = needed
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {
        "required": ["rules"],
        "properties": {
            "rules": {"items": {"required": complete["Rule"]}},
            "exceptions": {"items": {"required": complete["PolicyException"]}},
        },
    }
    schema = {"$schema": DRAFTS[draft], "$id": f"urn:safegen:policy:v1:{draft}", **schema, "title": "safegen policy"}
    schema = _walked(schema, _count_items)
    return _walked(schema, _to_draft_07) if draft == "draft-07" else schema


def schema_text(draft: Draft) -> str:
    """Returns the schema as it is published."""
    return json.dumps(json_schema(draft), indent=1, ensure_ascii=False) + "\n"


def schema_file(draft: Draft) -> str:
    """Returns the name of the published file."""
    return f"policy.v1.{draft}.json" if draft != "2020-12" else "policy.v1.json"


def _describe(schema: dict[str, Any], model: type[Strict]) -> None:
    """Puts what a model's docstring says about each attribute where an editor shows it."""
    summary, _, attributes = (model.__doc__ or "").partition("Attributes:")
    schema["description"] = " ".join(summary.split())
    for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12,}.*)*)", attributes, flags=re.MULTILINE):
        if name in schema["properties"]:
            schema["properties"][name] = _without_title(schema["properties"][name])
            schema["properties"][name]["description"] = " ".join(text.split())


def _without_title(schema: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in schema.items() if key != "title"}
    return {"allOf": [{"$ref": kept.pop("$ref")}], **kept} if "$ref" in kept else kept


def _walked(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if isinstance(schema, dict):
        part = cast("dict[str, Any]", schema)
        return change({key: _walked(value, change) for key, value in part.items()})
    return [_walked(item, change) for item in cast("list[Any]", schema)] if isinstance(schema, list) else schema


def _count_items(part: dict[str, Any]) -> dict[str, Any]:
    """Bounds lists by their items: pydantic bounds a list behind a validator by the length that texts have."""
    if part.get("type") != "array":
        return part
    return {{"minLength": "minItems", "maxLength": "maxItems"}.get(key, key): value for key, value in part.items()}


def _to_draft_07(part: dict[str, Any]) -> dict[str, Any]:
    """Renames what draft-07 calls otherwise; nothing that the models make has no counterpart there."""
    renamed = {("definitions" if key == "$defs" else key): value for key, value in part.items()}
    if isinstance(renamed.get("$ref"), str):
        renamed["$ref"] = renamed["$ref"].replace("#/$defs/", "#/definitions/")
    return renamed


def write_schemas(folder: Path) -> list[Path]:
    """Writes the schema in both drafts into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for draft in DRAFTS:
        paths.append(folder / schema_file(draft))
        paths[-1].write_text(schema_text(draft), encoding="utf-8")
    return paths


if __name__ == "__main__":
    write_schemas(shipped("policies") / "schema")
