"""The published schema, and the canonical form that every line must have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import rfc8785
from audit_samples import KEY, as_objects, write_run
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safegen.audit import AuditLog
from safegen.audit.chain import canonical, line_hash, record_hash, sealed
from safegen.audit.schema import check_line, check_values, json_schema, parse_record

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "reference" / "audit.schema.json"
GOLDEN = sorted((Path(__file__).parent / "golden").rglob("*[0-9n].jsonl"))


def test_the_published_schema_is_current() -> None:
    """`make schema` renews it."""
    assert json.loads(PUBLISHED.read_text("utf-8")) == json_schema()


def test_golden_and_new_records_are_of_the_published_schema(tmp_path: Path) -> None:
    schema = json.loads(PUBLISHED.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    with AuditLog.open(tmp_path, key=KEY, text="full", durable=False) as log:
        write_run(log)
    files = [*GOLDEN, log.path]
    assert len(files) == 5
    objects = [item for file in files for item in as_objects(file.read_bytes())]
    assert [str(error) for item in objects for error in validator.iter_errors(item)] == []
    gated = next(item for item in objects if item["kind"] == "gated")
    del gated["verdict"]
    assert "'verdict' is a required property" in str(next(validator.iter_errors(gated)))
    assert not validator.is_valid({**objects[0], "seq": "0"})


def test_all_readers_of_records_agree(tmp_path: Path) -> None:
    """The one that builds records, and the quick ones that only check."""
    lines = [line for file in GOLDEN for line in file.read_bytes().splitlines()]
    for line in lines:
        check_line(line)
        parse_record(line)
    whole: dict[str, Any] = json.loads(lines[2])
    paths = [("v",), ("prompt", "chars"), ("membranes", 0, "strength"), ("membranes", 0, "opened"), ("hits", 0, "rule")]
    for path in paths:
        for wrong in (None, "x", 1.5, [], {}, True, 7):
            changed = json.loads(json.dumps(whole))
            place: Any = changed
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = wrong
            line = rfc8785.dumps(changed)
            assert _faults(check_line, line) == _faults(parse_record, line), (path, wrong)
            assert _faults(check_values, changed) == _faults(parse_record, line), (path, wrong)


def _faults(read: Any, line: bytes) -> bool:
    try:
        read(line)
    except ValueError:
        return True
    return False


# Characters on which encoders and orders of keys differ, and those that numbers are made of.
words = st.text(st.sampled_from('ab"\\:,.[]}0123e-+é水\ue000\uffff\U0001f600\x00\n\x7f\u2028'), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=st.dictionaries(words, values, max_size=5))
@example({"a": -0.0, "b": 1e-05, "c": 1e21, "d": 2.0, "e": 1e-7, "f": 123456789012345680.0})
@example({"\ue000": 1, "\U0001f600": 2})
@example({"text": '":1.0,[2.0]:1e-5', "\\": 1.0, "uuid": "0e-4"})
def test_the_quick_encoder_writes_what_rfc_8785_demands(value: dict[str, Any]) -> None:
    assert canonical(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", b"bytes", object()])
def test_what_rfc_8785_refuses_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical({"value": value})


def test_sealing_in_two_halves_is_sealing_the_whole() -> None:
    for file in GOLDEN:
        for line in file.read_bytes().splitlines():
            record = json.loads(line)
            digest = record.pop("hash")
            assert sealed(record) == (digest, line)
            assert record_hash(record) == line_hash(line, digest) == digest
