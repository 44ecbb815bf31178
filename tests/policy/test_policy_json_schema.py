"""The published JSON Schema: current, valid in its draft, and in agreement with the loader."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from jsonschema import Draft7Validator, Draft202012Validator
from policy_samples import BASE, CHILD, EXCEPTION, HEAD, RULE, exception, rule

from safegen.policy.document import parse_document
from safegen.policy.json_schema import DRAFTS, Draft, json_schema, schema_file, schema_text
from safegen.policy.schema import Policy, Rule
from safegen.resources import shipped

VALIDATORS = {"2020-12": Draft202012Validator, "draft-07": Draft7Validator}


def faults(draft: Draft, text: str) -> list[str]:
    """What a JSON Schema validator says of a YAML text: the path of each fault."""
    validator = VALIDATORS[draft](json_schema(draft))
    return [error.json_path for error in validator.iter_errors(cast(Any, parse_document(text, "p.yaml").value))]


@pytest.mark.parametrize("draft", DRAFTS)
def test_what_is_published_is_current(draft: Draft) -> None:
    path = shipped("policies") / "schema" / schema_file(draft)
    assert path.read_text("utf-8") == schema_text(draft), "run python -m safegen.policy.json_schema"
    VALIDATORS[draft].check_schema(json.loads(path.read_text("utf-8")))


def test_draft_07_has_nothing_that_only_later_drafts_know() -> None:
    text = schema_text("draft-07")
    for word in ("$defs", "prefixItems", "dependentRequired", "unevaluated", "2020-12"):
        assert word not in text


def test_shipped_policies_name_the_schema_and_satisfy_it() -> None:
    for path in shipped("policies").glob("*.yaml"):
        if path.name.endswith(".policytest.yaml"):
            continue
        first = path.read_text("utf-8").splitlines()[0]
        assert first == f"# yaml-language-server: $schema=./schema/{schema_file('draft-07')}", path.name
        for draft in DRAFTS:
            assert faults(draft, path.read_text("utf-8")) == [], path.name


GOOD = [
    HEAD + RULE,
    BASE,
    CHILD,
    exception(),
    CHILD + "rules:\n  - {id: skin, strength: 3}\nexceptions:\n  - {id: atlas, expires: 2026-12-31}\n",
    HEAD + rule(applies_to="inpaint", transport="{score: paper, lo: 0.1, hi: 1}"),
    HEAD + RULE.replace("explicit", "explicit/nudity"),
    HEAD + "extends: [strict, builtin://mini-strict]\n",
]
BAD = [
    (HEAD, "$"),
    (HEAD + "rules: []\n", "$.rules"),
    (HEAD + RULE + "ruels: 1\n", "$"),
    (HEAD + RULE.replace("explicit", "explicitt"), "$.rules[0].category"),
    (HEAD + RULE.replace("category: explicit", "severity: high"), "$.rules[0]"),
    (HEAD + rule(action="drop"), "$.rules[0].action"),
    (HEAD + rule(strength="9"), "$.rules[0].strength"),
    (HEAD + rule(applies_to="[img2vid]"), "$.rules[0].applies_to"),
    (HEAD + "mode: off\n" + RULE, "$.mode"),
    (exception("reason: r, "), "$.exceptions[0]"),
    (exception("2027-03-31", "soon"), "$.exceptions[0].expires"),
    (exception("{tenant: t}", "{}"), "$.exceptions[0].when"),
    (exception("{tenant: t}", "{tenant: []}"), "$.exceptions[0].when.tenant"),
    (HEAD + f"extends: {['strict'] * 17}\n", "$.extends"),
    (CHILD + EXCEPTION.replace("id: x, ", ""), "$.exceptions[0]"),
]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("text", GOOD)
def test_good_policies_satisfy_it(draft: Draft, text: str) -> None:
    assert faults(draft, text) == []


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(("text", "path"), BAD)
def test_bad_policies_do_not(draft: Draft, text: str, path: str) -> None:
    assert path in faults(draft, text)


def test_an_editor_completes_every_key_with_what_it_means() -> None:
    schema = json_schema("draft-07")
    assert set(schema["properties"]) == set(Policy.model_fields)
    assert set(schema["definitions"]["Rule"]["properties"]) == set(Rule.model_fields)
    parts = [schema, *schema["definitions"].values()]
    missing = [name for part in parts for name, key in part.get("properties", {}).items() if not key.get("description")]
    assert missing == []
    assert schema["definitions"]["Rule"]["properties"]["action"]["enum"] == ["erase", "refuse", "flag"]
