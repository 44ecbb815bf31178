"""Every lint fires where it should, stays silent where it should, and has a section in the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from safegen.policy.catalogue import load_catalogue
from safegen.policy.lint import LINTS, Finding, MembraneFacts, lint, subject_of
from safegen.policy.load import shipped_policies
from safegen.resources import shipped

TODAY = date(2026, 11, 24)
PAGE = Path(__file__).parent.parent.parent / "docs" / "reference" / "lint.md"

HEAD = "apiVersion: safegen.dev/v1\nkind: Policy\nmetadata: {id: p, version: 1.0.0}\n"
RULE = "  - {id: nudity, concept: nudity, category: explicit}\n"
CASES = """\
apiVersion: safegen.dev/v1
kind: PolicyTest
policy: p.yaml
cases:
  - {name: a, prompt: naked, expect: {nudity: erase}}
  - {name: b, prompt: a van, expect: {"*": shut}}
"""
EXCEPTION = (
    "exceptions:\n  - {id: e, rules: [nudity], when: {tenant: t}, action: flag, owner: o, reason: ticket SEC-12345, "
    "expires: 2027-05-23}\n"
)


def found(
    folder: Path,
    policy: str,
    cases: str | None = CASES,
    membranes: Mapping[str, MembraneFacts] | None = None,
) -> list[Finding]:
    path = folder / "p.yaml"
    path.write_text(policy, "utf-8")
    if cases is not None:
        (folder / "p.policytest.yaml").write_text(cases, "utf-8")
    subject = subject_of(path, load_catalogue(), TODAY)
    return list(lint(replace(subject, base="mini", membranes=membranes or {})))


def shown(findings: list[Finding]) -> list[str]:
    return [f"{f.lint} {f.place.line}:{f.place.column}" for f in findings]


def test_a_policy_without_findings(tmp_path: Path) -> None:
    assert found(tmp_path, HEAD + "rules:\n" + RULE + EXCEPTION) == []


GROUP = "  - {id: styles, concept: artist-style/*, category: artist-style, severity: medium}\n"
STYLES = CASES + "  - {name: c, prompt: x, expect: {styles: erase}}\n  - {name: d, prompt: x, expect: {monet: erase}}\n"
FINDINGS = [
    ("SG001 5:10", HEAD + "rules:\n" + RULE, None, "has no test case that opens it and none that leaves it shut"),
    ("SG001 5:10", HEAD + "rules:\n" + RULE, CASES.replace("erase", "shut"), "has no test case that opens it; add one"),
    (
        "SG002 7:108",
        HEAD + "rules:\n" + RULE + EXCEPTION.replace("2027-05-23", "2027-05-24"),
        CASES,
        "exception 'e' holds for 181 more days; expected at most 180",
    ),
    (
        "SG003 5:67",
        HEAD + "rules:\n" + RULE.replace("}", ", on_missing: flag}"),
        CASES,
        "on_missing: flag draws what the policy means to erase",
    ),
    ("SG003 4:24", HEAD + "defaults: {on_missing: flag}\nrules:\n" + RULE, CASES, "use refuse-prompts or error"),
    (
        "SG005 3:42",
        HEAD.replace("1.0.0}", "1.0.0, owner: y}") + "rules:\n" + RULE,
        CASES,
        "y without quotes is true or false to YAML 1.1 tools; put it in quotes",
    ),
    (
        "SG005 3:48",
        HEAD.replace("1.0.0}", "1.0.0, description: 12:30:45}") + "rules:\n" + RULE,
        CASES,
        "12:30:45 without quotes is a number to base 60",
    ),
    (
        "SG006 7:26",
        HEAD
        + "rules:\n"
        + RULE
        + GROUP
        + "  - {id: monet, concept: monet, category: artist-style, severity: medium}\n",
        STYLES,
        "rule 'monet' does what the wider rule 'styles' does for monet anyway",
    ),
    (
        "SG007 5:67",
        HEAD + "rules:\n" + RULE.replace("}", ", applies_to: [txt2img, inpaint]}"),
        CASES,
        "rule 'nudity' does not apply to img2img",
    ),
    (
        "SG008 7:81",
        HEAD + "rules:\n" + RULE + EXCEPTION.replace("ticket SEC-12345", "todo"),
        CASES,
        "the reason 'todo' says nothing to a reviewer",
    ),
    (
        "SG010 5:66",
        HEAD + "rules:\n" + RULE.replace("}", ", transport: {score: lexical}}"),
        CASES,
        "rule 'nudity' of severity high opens by words alone",
    ),
    (
        "SG011 4:1",
        HEAD + "rules:\n" + RULE,
        CASES.replace('"*"', "nudity"),
        "no case expects every rule to stay shut",
    ),
]


@pytest.mark.parametrize(
    ("where", "policy", "cases", "message"), FINDINGS, ids=[f"{f[0]}-{k}" for k, f in enumerate(FINDINGS)]
)
def test_findings(tmp_path: Path, where: str, policy: str, cases: str | None, message: str) -> None:
    findings = found(tmp_path, policy, cases)
    assert shown(findings) == [where], findings
    assert message in findings[0].message


SILENT = [
    ("mode: observe\ndefaults: {on_missing: flag}\nrules:\n" + RULE, CASES),
    ("rules:\n" + RULE.replace("}", ", action: flag, on_missing: flag}"), CASES.replace("erase", "flag")),
    ("rules:\n" + RULE.replace("}", ", transport: {score: lexical, least: 0.2}}"), CASES),
    ("rules:\n" + RULE.replace("}", ", severity: low, transport: {score: lexical}}"), CASES),
    ("rules:\n" + RULE.replace("}", ", applies_to: [txt2img, img2img, inpaint]}"), CASES),
    (
        "rules:\n" + RULE + GROUP + "  - {id: monet, concept: monet, category: artist-style, action: flag}\n",
        STYLES.replace("monet: erase", "monet: flag"),
    ),
]


@pytest.mark.parametrize(("policy", "cases"), SILENT)
def test_what_differs_by_intent_is_no_finding(tmp_path: Path, policy: str, cases: str) -> None:
    assert found(tmp_path, HEAD + policy, cases) == []


def test_an_override_states_a_reason_that_a_reviewer_can_use(tmp_path: Path) -> None:
    policy = HEAD + "extends: builtin://explicit-only\nrules:\n"
    rule = "  - {id: nudity, concept: nudity, category: explicit, strength: 1.0, override: true, reason: %s}\n"
    assert shown(found(tmp_path, policy + rule % "as asked in SEC-99")) == []
    assert shown(found(tmp_path, policy + rule % "TBD")) == ["SG008 6:94"]


def test_a_rule_that_states_only_what_differs_from_what_it_inherits(tmp_path: Path) -> None:
    policy = HEAD + "extends: builtin://explicit-only\nrules:\n  - {id: nudity, strength: 3.0}\n"
    assert found(tmp_path, policy) == []
    assert shown(found(tmp_path, policy, CASES.replace("erase", "shut"))) == ["SG001 6:10"]


def test_membranes_are_looked_at_where_a_base_is_named(tmp_path: Path) -> None:
    policy = HEAD + "rules:\n" + RULE
    good = MembraneFacts(tmp_path / "m.safetensors", "ab" * 32, "mini", f"File sha256 `{'ab' * 32}`")
    assert found(tmp_path, policy, membranes={"nudity": good, "ghost": replace(good, base="sd1")}) == []
    assert shown(found(tmp_path, policy, membranes={"nudity": replace(good, card="")})) == ["SG004 5:27"]
    (foreign,) = found(tmp_path, policy, membranes={"nudity": replace(good, base="sd1")})
    assert (foreign.lint, foreign.level) == ("SG009", "error")
    assert "was made for base 'sd1', not 'mini'" in foreign.message


def test_shipped_policies_have_no_findings() -> None:
    for name in shipped_policies():
        assert lint(subject_of(shipped("policies") / f"{name}.yaml", load_catalogue(), TODAY)) == (), name


def test_every_lint_has_a_section_that_explains_it() -> None:
    sections = dict(re.findall(r"^## (SG\d{3} [^\n]*)\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S))
    assert list(sections) == [f"{one.id} {one.name}" for one in LINTS]
    for one in LINTS:
        section = sections[f"{one.id} {one.name}"]
        assert one.summary in section, one.id
        assert f"Level: {one.level}." in section, one.id
        for part in ("**Avoid**", "**Prefer**", "**Why**"):
            assert part in section, (one.id, part)


def test_ids_follow_one_another() -> None:
    assert [one.id for one in LINTS] == [f"SG{k:03d}" for k in range(1, len(LINTS) + 1)]
    assert {f[0][:5] for f in FINDINGS} | {"SG004", "SG009"} == {one.id for one in LINTS}
