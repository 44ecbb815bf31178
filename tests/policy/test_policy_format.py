"""The one layout of policy files, on samples that people write."""

from __future__ import annotations

import pytest

from safegen.errors import PolicySyntaxError, SafegenError
from safegen.policy.format import WIDTH, formatted
from safegen.resources import shipped

UNTIDY = """\
# top
apiVersion:   safegen.dev/v1

metadata: { id: p,version: 1.0.0 }   # who
rules:
-   id: a      # the first
    score: [ direction,lexical ]
    # before the strength
    strength:   1.50


-   {id: b,   quoted: "off", 'single': 010}
# the end
"""
TIDY = """\
# top
apiVersion: safegen.dev/v1

metadata: {id: p, version: 1.0.0}    # who
rules:
  - id: a      # the first
    score: [direction, lexical]
    # before the strength
    strength: 1.50


  - {id: b, quoted: "off", 'single': 010}
# the end
"""


def test_spaces_and_indentation_are_laid_out_anew_and_nothing_else() -> None:
    assert formatted(UNTIDY, "p.yaml") == TIDY
    assert formatted("\ufeff" + UNTIDY.replace("\n", "\r\n"), "p.yaml") == TIDY


@pytest.mark.parametrize(
    "scalar",
    ["2027-03-31", "010", "1_000", "0x1F", "1e3", ".5", "-0.0", "12:30:45", "'a''b'", '"é"', "1.10", "猫"],
)
def test_scalars_stay_as_they_are_written(scalar: str) -> None:
    text = f"a: {scalar}\nb:\n  - {scalar} # why\n"
    assert formatted(text, "p.yaml") == text


def test_an_escape_is_not_turned_into_a_letter_that_cannot_be_seen() -> None:
    with pytest.raises(SafegenError, match="would be written .* which may hide what is in it"):
        formatted('a: "a\\u200bb"\n', "p.yaml")


def test_brackets_that_do_not_fit_are_opened_from_the_outside() -> None:
    names = [f"name-{k:02}" for k in range(16)]
    text = f"a: [{', '.join(names)}] # why\n\nb: [{{x: [{', '.join(names)}], y: 1}}]\nc: [{', '.join(names[:3])}]\n"
    lines = formatted(text, "p.yaml").splitlines()
    assert lines[:2] == ["a:", "  - name-00"]
    assert lines[16:20] == ["  - name-15 # why", "", "b:", "  - x:"]
    assert lines[-2:] == ["    y: 1", "c: [name-00, name-01, name-02]"]
    assert max(map(len, lines)) <= WIDTH


def test_long_texts_are_never_wrapped() -> None:
    text = f"a: {'word ' * 60}end\nb: '{'word ' * 60}end'\n"
    assert formatted(text, "p.yaml") == text


@pytest.mark.parametrize("text", ["a: [1, # one\n  2]\n", "a: {x: 1, # one\n  y: 2}\n"])
def test_a_comment_inside_brackets_is_refused_before_it_is_lost(text: str) -> None:
    with pytest.raises(SafegenError, match="p.yaml: the comment '# one' would be lost or moved; put it on a line"):
        formatted(text, "p.yaml")


@pytest.mark.parametrize("text", ["a: &x 1\nb: *x\n", "a: [\n", ""])
def test_refused_yaml_is_not_laid_out(text: str) -> None:
    with pytest.raises(PolicySyntaxError, match=r"p\.yaml:[12]:1: |p\.yaml:1:4: "):
        formatted(text, "p.yaml")


def test_shipped_policies_are_laid_out() -> None:
    for path in shipped("policies").glob("*.yaml"):
        text = path.read_text("utf-8")
        assert formatted(text, path.name) == text, path.name
