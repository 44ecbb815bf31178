"""A small catalogue and the policies that the tests of the policy layer start from."""

from __future__ import annotations

from safegen.policy.catalogue import Catalogue, Concept

CONCEPTS = (
    Concept(id="van-gogh", name="Van Gogh", category="artist-style", living=False),
    Concept(id="banksy", name="Banksy", category="artist-style", living=True),
    Concept(id="nudity", name="nude", category="explicit/nudity", aliases=("naked",), benign=("nude lipstick",)),
    Concept(id="gore", name="gore", category="explicit/gore"),
    Concept(id="pikachu", name="Pikachu", category="ip-character"),
    Concept(id="ghost", name="ghost", category="object"),
)
CATALOGUE = Catalogue({c.id: c for c in CONCEPTS}, frozenset({"van-gogh", "banksy", "nudity", "gore", "pikachu"}))

HEAD = "apiVersion: safegen.dev/v1\nkind: Policy\nmetadata: {id: p, version: 1.0.0}\n"
RULE = "rules:\n  - {id: a, concept: nudity, category: explicit}\n"
EXCEPTION = (
    "exceptions:\n  - {id: x, rules: a, when: {tenant: t}, action: flag, reason: r, owner: o, expires: 2027-03-31}\n"
)
BASE = """\
apiVersion: safegen.dev/v1
kind: Policy
metadata: {id: base, version: 1.0.0}
defaults:
  transport: {lo: 0.3, hi: 0.6}
rules:
  - {id: skin, concept: explicit/*, category: explicit, strength: 2.0}
  - id: art
    concept: artist-style/*
    category: artist-style
    action: refuse
exceptions:
  - {id: atlas, rules: skin, when: {tenant: [a, b]}, action: flag, reason: r, owner: o, expires: 2027-01-31}
"""
"""A parent policy; tests lay it beside theirs as base.yaml."""
CHILD = HEAD + "extends: base.yaml\n"


def rule(**keys: str) -> str:
    """Returns `RULE` with further keys."""
    return RULE.replace("}", "".join(f", {key}: {value}" for key, value in keys.items()) + "}")


def exception(old: str = "", new: str = "") -> str:
    """Returns a policy with an exception, one part of it replaced."""
    assert old in EXCEPTION
    return HEAD + RULE + EXCEPTION.replace(old, new, 1)
