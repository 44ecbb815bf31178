"""Policies by name and path, and every fault with its line, its column and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

import safegen.resources
from safegen.errors import PolicyNotFoundError, PolicySyntaxError, PolicyValidationError, SafegenError
from safegen.policy.catalogue import load_catalogue
from safegen.policy.document import MAX_BYTES, parse_document
from safegen.policy.load import find_policy, load_policy, shipped_policies
from safegen.resources import shipped

HEAD = "apiVersion: safegen.dev/v1\nkind: Policy\nmetadata: {id: p, version: 1.0.0}\n"
RULE = "rules:\n  - {id: a, concept: nudity, category: explicit}\n"


CONCEPTS = f"({len(load_catalogue().concepts)} in all)"


def faults_of(folder: Path, text: str) -> list[str]:
    """Loads `text` as a policy that must be invalid; returns `line:column: message` of each fault."""
    path = folder / "p.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyValidationError) as caught:
        load_policy(path)
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


SCHEMA_FAULTS = [
    (
        HEAD + "mode: off\n" + RULE,
        ["4:7: mode: expected enforce, observe or disabled, never a switch", "`mode: disabled`"],
    ),
    (HEAD + "mode: yes\n" + RULE, ["4:7: mode: expected enforce", "write `mode: enforce`; found 'yes'"]),
    (HEAD + "mode: false\n" + RULE, ["4:7: mode: expected enforce", "write `mode: disabled`; found false"]),
    (HEAD + "mode: enforced\n" + RULE, ["4:7: unknown mode 'enforced'. Did you mean 'enforce'?"]),
    (HEAD + "mode: 7\n" + RULE, ["4:7: mode: expected one of enforce, observe, disabled; found 7"]),
    (HEAD.replace("/v1", "/v2") + RULE, ["1:13: unknown apiVersion 'safegen.dev/v2'. Did you mean 'safegen.dev/v1'?"]),
    (HEAD.replace("1.0.0", "1.0") + RULE, ["3:28: version: expected text (put numbers in quotes); found 1.0"]),
    (HEAD.replace("1.0.0", "one") + RULE, ["3:28: version: expected a semantic version (like 1.0.0); found 'one'"]),
    (HEAD.replace("id: p", "id: My Policy") + RULE, ["3:16: id: expected kebab case", "found 'My Policy'"]),
    (HEAD.replace("id: p, ", "") + RULE, ["3:11: missing key 'id'"]),
    (HEAD, ["1:1: missing key 'rules'"]),
    (HEAD + "rules: []\n", ["4:8: rules: expected at least one entry; found an empty list"]),
    (HEAD + "rules: 5\n", ["4:8: rules: expected a list; found 5"]),
    (HEAD + "rules: [5]\n", ["4:9: rules[0]: expected keys and values; found 5"]),
    (HEAD + RULE + "ruels: []\n", ["6:1: unknown key 'ruels'. Did you mean 'rules'?"]),
    (HEAD + "defaults:\n  on_unknown:\n" + RULE, ["5:3: on_unknown: expected one of open, refuse; found nothing"]),
    (HEAD + "defaults: {transport: {score: clip}}\n" + RULE, ["4:31: unknown score[0] 'clip'. Known: always, "]),
    (HEAD + "defaults: {transport: {score: []}}\n" + RULE, ["4:31: score: expected at least one entry"]),
    (HEAD + "defaults: {transport: {lo: 2}}\n" + RULE, ["4:28: lo: expected a number from -1 to 1, or calibrated"]),
    (HEAD + "defaults: {transport: {lo: true}}\n" + RULE, ["4:28: lo: expected a number from -1 to 1"]),
    (
        HEAD + "defaults: {transport: {lo: 0.4}}\n" + RULE,
        ["4:23: lo is 0.4 and hi is calibrated: expected two numbers"],
    ),
    (HEAD + "defaults: {transport: {lo: 1, hi: 0}}\n" + RULE, ["4:23: lo is 1, above hi, which is 0"]),
    (
        HEAD + "defaults: {transport: {lo: 0.3, hi: 0.6}}\n" + RULE.replace("}", ", transport: {lo: 0.7}}"),
        ["6:61: lo is 0.7, above hi, which is 0.6"],
    ),
    (HEAD + RULE.replace("}", ", transport: {score: semantic}}"), ["5:61: the score semantic needs"]),
    (HEAD + "defaults: {transport: {least: 1.5}}\n" + RULE, ["4:31: least: expected less than or equal to 1"]),
    (HEAD + "defaults: {transport: {guidance: all}}\n" + RULE, ["4:34: unknown guidance 'all'"]),
    (HEAD + RULE.replace("}", ", strength: 9}"), ["5:60: strength: expected less than or equal to 4; found 9"]),
    (HEAD + RULE.replace("}", ", strength: true}"), ["5:60: strength: ", "found true"]),
    (HEAD + RULE.replace("}", ", severity: hgih}"), ["5:60: unknown severity 'hgih'. Did you mean 'high'?"]),
    (HEAD + RULE.replace("}", ", on_mising: flag}"), ["5:50: unknown key 'on_mising'. Did you mean 'on_missing'?"]),
    (HEAD + RULE.replace("nudity", "nudty"), ["5:22: unknown concept 'nudty'. Did you mean 'nudity'?", CONCEPTS]),
    (HEAD + RULE.replace("nudity", "explicit"), ["5:22: unknown concept 'explicit'. Did you mean 'explicit/*'?"]),
    (HEAD + RULE.replace("nudity", "explict/*"), ["5:22: unknown concept 'explict/*'. Did you mean 'explicit/*'?"]),
    (HEAD + RULE.replace("nudity", "object/*"), ["5:22: unknown concept 'object/*'"]),
    (HEAD + RULE.replace("explicit", "object"), ["5:40: concept 'nudity' is of category explicit, not object"]),
    (HEAD + RULE + RULE.splitlines()[1] + "\n", ["6:10: rule id 'a' is used twice"]),
    (HEAD + RULE + "audit: {on_failure: degrade}\n", ["6:21: degrade does not go with mode enforce"]),
    (HEAD + RULE + "audit: {text: some}\n", ["6:15: unknown text 'some'. Known: full, none, redacted."]),
    ("- a\n", ["1:1: expected keys and values, found a list"]),
]


@pytest.mark.parametrize(("text", "parts"), SCHEMA_FAULTS)
def test_fault_says_where_and_what(tmp_path: Path, text: str, parts: list[str]) -> None:
    fault = faults_of(tmp_path, text)[0]
    assert fault.startswith(parts[0].split(": ")[0] + ": ")
    assert all(part in fault for part in parts), fault


def test_all_faults_at_once_in_document_order(tmp_path: Path) -> None:
    text = HEAD + (
        "mode: on\n"
        "rules:\n"
        "  - {id: A, concept: van-gog, category: artist-style, action: drop}\n"
        "  - {id: b, concept: nudity, category: explicit, strenght: 2}\n"
        "  - {id: b, concept: nudity, category: object}\n"
        "audit: {on_failure: degrade}\n"
        "extra: 1\n"
    )
    faults = faults_of(tmp_path, text)
    assert [fault.split(": ")[0] for fault in faults] == [
        "4:7", "6:10", "6:22", "6:63", "7:50", "8:10", "8:22", "8:40", "10:1",
    ]  # fmt: skip


SYNTAX_FAULTS = [
    ("", "1:1: the file is empty"),
    ("# only a comment\n", "1:1: the file is empty"),
    ("a: [1\n", "2:1: not YAML: expected ',' or ']'"),
    ("a: b: c\n", "1:5: not YAML: mapping values are not allowed here"),
    ("\ta: 1\n", "1:1: not YAML: found character"),
    ("a: \x07\n", "1:1: not YAML: unacceptable character #x0007"),
    ("a: &x 1\n", "1:4: anchor &x is refused"),
    ("a: *x\n", "1:4: alias *x is refused"),
    ("<<: {a: 1}\n", "1:1: merge key << is refused"),
    ("a: !!python/name:os.system 1\n", "1:4: tag tag:yaml.org,2002:python/name:os.system is refused"),
    ("a: 1\nb: 2\na: 3\n", "3:1: duplicate key 'a'; first at line 1, column 1"),
    ("? [x]\n: 1\n", "1:3: a key must be plain text"),
    ("a: 1\n---\nb: 1\n", "2:1: a second document starts here"),
    ("%YAML 1.1\n---\na: on\n", "2:1: directives are refused"),
    ("[" * 40 + "]" * 40, "1:33: nested deeper than 32 levels"),
    ("[" * 5000, "1:33: nested deeper than 32 levels"),
    ("a: [" + "1," * 20_001 + "]\n", "more than 20000 values"),
    ("a: " + "x" * MAX_BYTES, "1:1: the file is larger than 256 KiB"),
]


@pytest.mark.parametrize(("text", "message"), SYNTAX_FAULTS)
def test_refused_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicySyntaxError) as caught:
        load_policy(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:")


def test_all_refused_features_at_once(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("a: &x 1\nb: *x\na: !!str 2\n", encoding="utf-8")
    with pytest.raises(PolicySyntaxError) as caught:
        load_policy(path)
    places = [line.removeprefix(f"{path}:").split(": ")[0] for line in str(caught.value).splitlines()]
    assert places == ["1:4", "2:4", "3:1", "3:4"]


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(PolicySyntaxError, match=r"2:4: not UTF-8 \(byte 0xff\)"):
        load_policy(path)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + (HEAD + RULE).encode())
    assert load_policy(path).metadata.id == "p"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("yes", "yes"), ("010", 10), ("12:30:45", "12:30:45"), ("2026-01-01", "2026-01-01"),
        ("1e3", 1000.0), ("true", True), ("~", None), ("'1'", "1"), (".5", 0.5), (".inf", ".inf"), ("9" * 30, 1e30),
    ],
)  # fmt: skip
def test_scalars_follow_the_yaml_12_core_schema(text: str, value: object) -> None:
    document = parse_document(f"a: {text}\n", "x")
    assert repr(document.value) == repr({"a": value})  # 1 == True == 1.0, but not here


def test_shipped_policies_load() -> None:
    assert shipped_policies() == (
        "artists", "balanced", "explicit-only", "ip-characters", "kids", "mini-strict", "observe-only", "strict",
    )  # fmt: skip
    assert [load_policy(name).metadata.id for name in shipped_policies()] == list(shipped_policies())


def test_observe_only_has_the_rules_of_strict() -> None:
    observed, strict = load_policy("observe-only"), load_policy("strict")
    plain = {"description": ""}
    assert [rule.model_copy(update=plain) for rule in observed.rules] == [
        rule.model_copy(update=plain) for rule in strict.rules
    ]
    assert (observed.mode, strict.mode) == ("observe", "enforce")
    assert observed.defaults.model_dump() == strict.defaults.model_dump()


def test_find_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strict").write_text("not me")
    at_home = shipped("policies") / "strict.yaml"
    assert find_policy("strict") == at_home
    assert find_policy("policies/strict.yaml") == at_home
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "strict.yaml").write_text("mine")
    assert find_policy("policies/strict.yaml").read_text() == "mine"
    assert find_policy(Path("strict")).read_text() == "not me"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stric", "stric: neither a file nor a shipped policy. Did you mean 'strict'?"),
        ("elsewhere/strict.yaml", "neither a file nor a shipped policy. Did you mean 'strict'?"),
        ("policies/../../etc/passwd", "neither a file nor a shipped policy"),
        (".", ".: is a folder, not a policy file"),
    ],
)
def test_unknown_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolicyNotFoundError) as caught:
        load_policy(name)
    assert message in str(caught.value)


def test_shipped_prefers_the_wheel_and_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "safegen"
    monkeypatch.setattr(safegen.resources, "_PACKAGE", package)
    with pytest.raises(SafegenError, match="the shipped policies are missing"):
        shipped("policies")
    (tmp_path / "policies").mkdir()
    assert shipped("policies") == tmp_path / "policies"
    (package / "_data" / "policies").mkdir(parents=True)
    assert shipped("policies") == package / "_data" / "policies"
