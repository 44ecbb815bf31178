"""What a policy comes to when it extends others: whose value holds, where it stands, and what may be looser."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from policy_samples import BASE, CATALOGUE, CHILD, EXCEPTION, HEAD

from safegen.errors import PolicyValidationError
from safegen.policy.load import load_policy
from safegen.policy.resolve import ResolvedPolicy, resolve
from safegen.policy.schema import BUILT_IN, Policy

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def load(folder: Path, text: str, **files: str) -> Policy:
    """Loads a policy that lies beside base.yaml and further files."""
    for name, content in {"base": BASE, "p": text, **files}.items():
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    return load_policy(folder / "p.yaml", catalogue=CATALOGUE)


def resolved(policy: Policy) -> ResolvedPolicy:
    return resolve(policy, CATALOGUE, available={"nudity"}, now=NOW, family="sd1")


def test_a_policy_that_only_extends_is_its_parent_under_its_own_name(tmp_path: Path) -> None:
    child, base = load(tmp_path, CHILD), load_policy(tmp_path / "base.yaml", catalogue=CATALOGUE)
    assert (child.metadata.id, base.metadata.id) == ("p", "base")
    assert resolved(child).rules == resolved(base).rules
    assert child.exceptions == base.exceptions
    assert resolved(child).digest != resolved(base).digest  # the name is in it


def test_keys_are_laid_over_one_by_one_and_rules_by_id(tmp_path: Path) -> None:
    text = CHILD + (
        "defaults: {transport: {hi: 0.5}}\n"
        "rules:\n"
        "  - {id: idol, concept: pikachu, category: ip-character}\n"
        "  - {id: art, severity: critical, transport: {lo: 0.2}}\n"
        "exceptions:\n"
        "  - {id: atlas, expires: 2026-12-31}\n"
    )
    policy = load(tmp_path, text)
    assert [rule.id for rule in policy.rules] == ["skin", "art", "idol"]
    skin, art, idol = (
        next(r for r in resolved(policy).rules if r.id.split("/")[0] == name) for name in ("skin", "art", "idol")
    )
    assert (art.action, art.severity.value, art.transport.lo, art.transport.hi) == ("refuse", "critical", 0.2, 0.5)
    assert (skin.strength, skin.transport.lo, skin.transport.hi) == (2.0, 0.3, 0.5)
    assert idol.transport.lo == 0.3
    assert (policy.exceptions[0].expires, policy.exceptions[0].when) == (date(2026, 12, 31), {"tenant": ("a", "b")})


def test_every_value_knows_the_file_and_line_that_states_it(tmp_path: Path) -> None:
    text = CHILD + "defaults: {transport: {hi: 0.5}}\nrules:\n  - id: art\n    severity: critical\n"
    base, child = tmp_path / "base.yaml", tmp_path / "p.yaml"
    policy = load(tmp_path, text)
    art = next(rule for rule in resolved(policy).rules if rule.id == "art/banksy")
    assert art.places == {
        "action": f"{base}:11",
        "severity": f"{child}:8",
        "strength": BUILT_IN,
        "on_missing": BUILT_IN,
        "applies_to": BUILT_IN,
        "transport.score": BUILT_IN,
        "transport.lo": f"{base}:5",
        "transport.hi": f"{child}:5",
        "transport.least": BUILT_IN,
        "transport.guidance": BUILT_IN,
    }
    assert resolved(policy).exceptions[0].place == f"{base}:13"


def test_what_resolve_says_of_places_is_true_of_the_files(tmp_path: Path) -> None:
    policy = load(tmp_path, CHILD + "rules:\n  - {id: skin, strength: 3.5}\n")
    skin = next(rule for rule in resolved(policy).rules if rule.id == "skin/nudity")
    file, line = skin.places["strength"].rsplit(":", 1)
    assert "3.5" in Path(file).read_text("utf-8").splitlines()[int(line) - 1]


def test_of_two_parents_the_later_is_laid_over_and_neither_may_be_loosened(tmp_path: Path) -> None:
    other = BASE.replace("id: base", "id: other").replace("strength: 2.0", "strength: 3.0")
    both = HEAD + "extends: [base.yaml, other.yaml]\n"
    assert load(tmp_path, both, other=other).rules[0].strength == 3.0
    with pytest.raises(PolicyValidationError) as caught:
        load(tmp_path, HEAD + "extends: [other.yaml, base.yaml]\n", other=other)
    (fault,) = map(str, caught.value.problems)
    assert "rule 'skin': strength 2 is looser than 3" in fault
    settled = HEAD + "extends: [other.yaml, base.yaml]\nrules:\n  - {id: skin, strength: 3.0}\n"
    assert load(tmp_path, settled, other=other).rules[0].strength == 3.0


def test_shipped_policies_are_extended_by_name(tmp_path: Path) -> None:
    for entry in ("strict", "builtin://strict"):
        path = tmp_path / "p.yaml"
        path.write_text(HEAD + f"extends: {entry}\n", encoding="utf-8")
        assert [rule.id for rule in load_policy(path).rules] == [rule.id for rule in load_policy("strict").rules]


OVERRIDES = [
    ("rules:\n  - {id: skin, strength: 1.0, override: true, reason: weaker}\n", "strength 1 is looser than 2"),
    ("override: true\nreason: trial\nmode: observe\n", "mode observe is looser than enforce"),
    ("override: true\nreason: trial\ndefaults: {on_missing: flag}\n", "defaults.on_missing flag is looser"),
    (
        EXCEPTION.replace("rules: a", "rules: art").replace("}\n", ", override: true}\n"),
        "exception 'x' from 'van-gogh'",
    ),
    (
        "rules:\n  - {id: b, concept: banksy, category: artist-style, action: flag, override: true, reason: living}\n",
        "rule 'b' takes 'banksy' from 'art': action flag is looser",
    ),
]


@pytest.mark.parametrize(("text", "message"), OVERRIDES)
def test_an_override_with_a_reason_is_let_through_and_told(tmp_path: Path, text: str, message: str) -> None:
    policy = load(tmp_path, CHILD + text)
    assert any(message in one for one in policy.overrides)
    assert any("looser than what it extends" in notice and message in notice for notice in resolved(policy).notices)


def test_an_override_of_one_rule_is_none_of_another_or_of_the_whole(tmp_path: Path) -> None:
    text = CHILD + (
        "mode: observe\nrules:\n  - {id: skin, strength: 1.0, override: true, reason: r}\n  - {id: art, action: flag}\n"
    )
    with pytest.raises(PolicyValidationError) as caught:
        load(tmp_path, text)
    first, second = map(str, caught.value.problems)
    assert "mode observe" in first
    assert "rule 'art'" in second


def test_an_override_is_not_inherited_and_stays_told(tmp_path: Path) -> None:
    middle = CHILD + "rules:\n  - {id: skin, strength: 1.0, override: true, reason: weaker}\n"
    leaf = HEAD + "extends: middle.yaml\nrules:\n  - {id: skin, strength: 0.5}\n"
    with pytest.raises(PolicyValidationError, match=r"strength 0\.5 is looser than 1 "):
        load(tmp_path, leaf, middle=middle)
    told = load(tmp_path, HEAD + "extends: middle.yaml\n", middle=middle).overrides
    assert len(told) == 1
    assert "weaker" in told[0]


def test_an_exception_from_a_rule_of_ones_own_needs_no_override(tmp_path: Path) -> None:
    own = "rules:\n  - {id: a, concept: pikachu, category: ip-character}\n"
    assert load(tmp_path, CHILD + own + EXCEPTION).exceptions[1].id == "x"
    over = "rules:\n  - {id: a, concept: banksy, category: artist-style, action: refuse}\n"
    with pytest.raises(PolicyValidationError, match="exception 'x' from 'banksy'"):
        load(tmp_path, CHILD + over + EXCEPTION)
