"""What a policy comes to on one base model, and which prompts its phrases meet."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from safegen.errors import MembraneNotFoundError, PolicyConflictError
from safegen.policy.catalogue import Catalogue, Concept, load_catalogue
from safegen.policy.hits import Hit, lexical_hits
from safegen.policy.load import load_policy
from safegen.policy.resolve import ResolvedPolicy, resolve
from safegen.policy.schema import Policy

NOW = datetime(2026, 6, 1, tzinfo=UTC)
CONCEPTS = (
    Concept(id="van-gogh", name="Van Gogh", category="artist-style", living=False, languages={"zh": ("梵高",)}),
    Concept(id="monet", name="Claude Monet", category="artist-style", living=False, aliases=("Monet",)),
    Concept(id="nudity", name="nude", category="explicit", aliases=("naked",), benign=("nude lipstick", "naked eye")),
    Concept(id="ghost", name="ghost", category="ip-character", benign=("ghost town",)),
    Concept(id="popart", name="popart", category="artist-style"),
)
CATALOGUE = Catalogue({c.id: c for c in CONCEPTS}, frozenset({"van-gogh", "monet", "nudity"}))
RULES = """
  - {id: art, concept: artist-style/*, category: artist-style, transport: {lo: 0.4, hi: 1}}
  - {id: nudity, concept: nudity, category: explicit, severity: critical, strength: 2}
"""


def policy(folder: Path, rules: str = RULES, extra: str = "") -> Policy:
    """Loads a policy of these rules."""
    path = folder / "p.yaml"
    head = "apiVersion: safegen.dev/v1\nkind: Policy\nmetadata: {id: p, version: 1.0.0}\n"
    path.write_text(f"{head}{extra}\nrules:{rules}", encoding="utf-8")
    return load_policy(path, catalogue=CATALOGUE)


def by_id(resolved: ResolvedPolicy) -> dict[str, tuple[bool, str]]:
    return {rule.id: (rule.has_membrane, rule.effective) for rule in resolved.rules}


def test_a_category_becomes_one_rule_per_world_concept(tmp_path: Path) -> None:
    resolved = resolve(policy(tmp_path), CATALOGUE, available={"van-gogh", "nudity"}, now=NOW)
    assert by_id(resolved) == {
        "art/van-gogh": (True, "erase"),
        "art/monet": (False, "refuse"),
        "nudity": (True, "erase"),
    }
    art, _, nudity = resolved.rules
    assert art.concept.phrases == ("Van Gogh", "梵高")
    assert (art.transport.score, art.transport.lo, art.transport.hi) == (("direction", "lexical"), 0.4, 1)
    assert (nudity.transport.lo, nudity.strength, nudity.severity.value) == ("calibrated", 2.0, "critical")


def test_a_rule_takes_its_concept_out_of_the_category(tmp_path: Path) -> None:
    rules = RULES + "  - {id: my-monet, concept: monet, category: artist-style, action: flag}\n"
    resolved = resolve(policy(tmp_path, rules), CATALOGUE, available=(), now=NOW)
    assert [(rule.id, rule.effective) for rule in resolved.rules] == [
        ("art/van-gogh", "refuse"),
        ("nudity", "refuse"),
        ("my-monet", "flag"),
    ]


def test_on_missing_per_rule_and_by_default(tmp_path: Path) -> None:
    rules = """
  - {id: a, concept: monet, category: artist-style}
  - {id: b, concept: nudity, category: explicit, on_missing: refuse-prompts}
  - {id: c, concept: ghost, category: ip-character, action: refuse}
"""
    resolved = resolve(policy(tmp_path, rules, "defaults: {on_missing: flag}"), CATALOGUE, available=(), now=NOW)
    assert {rule.id: (rule.effective, rule.on_missing) for rule in resolved.rules} == {
        "a": ("flag", "flag"),
        "b": ("refuse", "refuse-prompts"),
        "c": ("refuse", "flag"),
    }


def test_on_missing_error_lists_all(tmp_path: Path) -> None:
    strict = policy(tmp_path, extra="defaults: {on_missing: error}")
    with pytest.raises(MembraneNotFoundError, match="2 rules .* for base family sd1: van-gogh, monet; train"):
        resolve(strict, CATALOGUE, available={"nudity"}, now=NOW, family="sd1")


def test_unknown_concepts_conflict(tmp_path: Path) -> None:
    loaded = policy(tmp_path, "\n  - {id: a, concept: ghost, category: ip-character}\n")
    with pytest.raises(PolicyConflictError, match="rule 'a' names concept 'ghost'"):
        resolve(loaded, Catalogue({"ghosts": CONCEPTS[3]}, frozenset()), available=(), now=NOW)


def test_notices(tmp_path: Path) -> None:
    resolved = resolve(policy(tmp_path), CATALOGUE, available={"nudity"}, now=NOW, family="sd1")
    assert resolved.notices == (
        "p: 1 of 3 rules erase; 2 have no membrane for base family sd1: "
        "prompts that name these concepts are refused (van-gogh, monet)",
    )
    assert resolve(policy(tmp_path), CATALOGUE, available=CATALOGUE.concepts, now=NOW).notices == ()
    observing = resolve(policy(tmp_path, extra="mode: observe"), CATALOGUE, available={"nudity"}, now=NOW)
    assert observing.notices[0].startswith("p: mode is observe")
    assert "would be refused" in observing.notices[1]
    disabled = resolve(policy(tmp_path, extra="mode: disabled"), CATALOGUE, available=CATALOGUE.concepts, now=NOW)
    assert disabled.notices == ("p: mode is disabled; nothing is refused, erased or flagged.",)


def test_digest_depends_on_content_only(tmp_path: Path) -> None:
    reordered = """
  # a comment
  - transport: {hi: 1.0, lo: 4.0e-1}
    category: artist-style
    concept: artist-style/*
    description: for people
    id: art
  - {strength: 2.0, severity: critical, category: explicit, concept: nudity, id: nudity}
"""
    base = resolve(policy(tmp_path), CATALOGUE, available={"nudity"}, now=NOW)
    assert len(base.digest) == 64
    assert resolve(policy(tmp_path, reordered), CATALOGUE, available=["nudity"], now=NOW).digest == base.digest
    changes = [
        resolve(policy(tmp_path, RULES.replace("0.4", "0.41")), CATALOGUE, available={"nudity"}, now=NOW),
        resolve(
            policy(tmp_path, RULES.replace("strength: 2", "strength: 1")),
            CATALOGUE,
            available={"nudity"},
            now=NOW,
        ),
        resolve(policy(tmp_path, extra="mode: observe"), CATALOGUE, available={"nudity"}, now=NOW),
        resolve(policy(tmp_path, extra="defaults: {on_unknown: refuse}"), CATALOGUE, available={"nudity"}, now=NOW),
        resolve(
            policy(tmp_path, extra="defaults: {transport: {guidance: both}}"),
            CATALOGUE,
            available={"nudity"},
            now=NOW,
        ),
        resolve(policy(tmp_path, extra="audit: {evidence: opened}"), CATALOGUE, available={"nudity"}, now=NOW),
        resolve(policy(tmp_path, extra="audit: {text: full}"), CATALOGUE, available={"nudity"}, now=NOW),
        resolve(policy(tmp_path), CATALOGUE, available=(), now=NOW),
    ]
    assert len({base.digest, *(changed.digest for changed in changes)}) == len(changes) + 1


def test_lexical_hits(tmp_path: Path) -> None:
    resolved = resolve(policy(tmp_path), CATALOGUE, available=(), now=NOW)
    assert lexical_hits(resolved, "a naked man by V@N G0GH, 梵高") == (
        Hit("art/van-gogh", "van-gogh", "van gogh"),
        Hit("art/van-gogh", "van-gogh", "梵高"),
        Hit("nudity", "nudity", "naked"),
    )
    assert lexical_hits(resolved, "a van on a road") == ()


@pytest.mark.parametrize(
    ("prompt", "hit"),
    [
        ("a nude lipstick", False),
        ("nude lipsticks, seen with the naked eye", False),
        ("n-u-d-e lipstick", False),
        ("nud3 lipst1ck", False),
        ("a nude woman with nude lipstick", True),
        ("the naked truth", True),
    ],
)
def test_benign_phrases_excuse_only_what_they_contain(tmp_path: Path, prompt: str, hit: bool) -> None:
    resolved = resolve(policy(tmp_path), CATALOGUE, available=(), now=NOW)
    assert bool(lexical_hits(resolved, prompt)) is hit


def test_mini_strict_erases_everything_it_names() -> None:
    names = {"ghost", "robot", "santa-claus", "popart", "blueprint", "bicycle"}
    resolved = resolve(load_policy("mini-strict"), load_catalogue(), available=names, now=NOW)
    assert {rule.concept.id for rule in resolved.rules} == names
    assert all(rule.effective == "erase" for rule in resolved.rules)
    assert resolved.notices == ()
    prompts = {"a phantom": "ghost", "father christmas": "santa-claus", "bikes": "bicycle", "pop art poster": "popart"}
    for prompt, concept in prompts.items():
        assert [hit.concept for hit in lexical_hits(resolved, prompt)] == [concept]
    assert lexical_hits(resolved, "a ghostly fox in the style of ink") == ()
