# ruff: noqa: E501 - messages stand here whole, as users read them
"""Invalid policies: every fault with its place and its whole message, and bombs that must stay small."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
from policy_samples import BASE, CATALOGUE, CHILD, EXCEPTION, HEAD, RULE, exception, rule

from safegen.errors import PolicySyntaxError, PolicyValidationError, did_you_mean
from safegen.policy.load import check_policy, load_policy, shipped_policies

LOOSER = "; what extends a policy is at least as strict: correct it, or state override: true"
SWITCH = (
    "yes, no, on and off without quotes are true or false to YAML 1.1 tools; quote the word, or write true or false"
)
SHIPPED = did_you_mean("?", shipped_policies())

FAULTS: list[tuple[str, str, list[str]]] = [
    (
        "two rules share an id",
        HEAD + RULE + "  - {id: a, concept: gore, category: explicit}\n",
        ["6:10: rule id 'a' is used twice"],
    ),
    (
        "two rules share a concept",
        HEAD + RULE + "  - {id: b, concept: nudity, category: explicit}\n",
        ["6:22: concept 'nudity' has rule 'a' already"],
    ),
    (
        "no rule and no parent",
        HEAD,
        ["1:1: missing key 'rules'; a policy has rules, or extends one that has"],
    ),
    (
        "an unknown category",
        HEAD + RULE.replace("explicit", "explicitt"),
        [
            "5:40: unknown category 'explicitt'. Did you mean 'explicit'? Known: artist-style, custom, explicit, ip-character, memorised, object."
        ],
    ),
    (
        "a branch that is not kebab case",
        HEAD + RULE.replace("explicit", "explicit/Nudity"),
        ["5:40: category: expected a category (like explicit or explicit/nudity); found 'explicit/Nudity'"],
    ),
    (
        "a branch too deep",
        HEAD + RULE.replace("explicit", "explicit/a/b/c"),
        ["5:40: category: expected a category (like explicit or explicit/nudity); found 'explicit/a/b/c'"],
    ),
    (
        "a branch that the concept is not in",
        HEAD + RULE.replace("explicit", "explicit/gore"),
        ["5:40: concept 'nudity' is of category explicit/nudity, not explicit/gore; correct one of the two"],
    ),
    (
        "a category that is a number",
        HEAD + RULE.replace("explicit", "3"),
        ["5:40: category: expected text (put numbers in quotes); found 3"],
    ),
    (
        "an unknown branch",
        HEAD + RULE.replace("nudity", "explicit/nudty/*"),
        [
            "5:22: unknown concept 'explicit/nudty/*'. Did you mean 'explicit/nudity/*'? Known: artist-style/*, explicit/*, explicit/gore/*, explicit/nudity/*, ip-character/*."
        ],
    ),
    (
        "a concept with a slash",
        HEAD + RULE.replace("nudity", "explicit/nudity"),
        [
            "5:22: concept: expected a concept id (like van-gogh) or a category (like artist-style/*); found 'explicit/nudity'"
        ],
    ),
    (
        "an unknown task",
        HEAD + rule(applies_to="[txt2img, img2vid]"),
        [
            "5:72: unknown applies_to[1] 'img2vid'. Did you mean 'img2img'? Known: controlnet, img2img, inpaint, txt2img, video."
        ],
    ),
    (
        "no task",
        HEAD + rule(applies_to="[]"),
        ["5:62: applies_to: expected at least one entry; found an empty list"],
    ),
    (
        "a task that is a number",
        HEAD + rule(applies_to="3"),
        ["5:62: applies_to: expected a list; found 3"],
    ),
    (
        "an unknown action",
        HEAD + rule(action="delete"),
        ["5:58: unknown action 'delete'. Known: erase, flag, refuse."],
    ),
    (
        "no strength",
        HEAD + rule(strength="0"),
        ["5:60: strength: expected greater than 0; found 0"],
    ),
    (
        "a strength that is text",
        HEAD + rule(strength="high"),
        ["5:60: strength: expected a number; found 'high'"],
    ),
    (
        "a floor below 0",
        HEAD + rule(transport="{least: -0.1}"),
        ["5:69: least: expected greater than or equal to 0; found -0.1"],
    ),
    (
        "a key of an older schema",
        HEAD + rule(floor="0.5"),
        [
            "5:50: unknown key 'floor'. Known: action, applies_to, category, concept, description, id, on_missing, override, reason, severity, strength, transport."
        ],
    ),
    (
        "override is no word",
        HEAD + rule(override="yes"),
        ["5:60: override: expected true or false; found 'yes'"],
    ),
    (
        "override without a parent",
        HEAD + rule(override="true", reason="because"),
        ["5:60: override goes with extends; there is no parent to override here"],
    ),
    (
        "override without a reason",
        CHILD + "rules:\n  - {id: skin, strength: 1.0, override: true}\n",
        ["6:41: override: true needs a reason beside it: why may this be looser than the parent?"],
    ),
    (
        "a reason without override",
        HEAD + rule(reason="because"),
        ["5:58: reason goes with override: true; use description for anything else"],
    ),
    (
        "override of everything without a parent",
        HEAD + "override: true\nreason: because\n" + RULE,
        ["4:11: override goes with extends; there is no parent to override here"],
    ),
    (
        "an exception without a reason",
        exception("reason: r, "),
        ["7:5: missing key 'reason'"],
    ),
    (
        "an exception with a blank owner",
        exception("owner: o", "owner: ' '"),
        ["7:74: owner: expected some words; found ' '"],
    ),
    (
        "an exception that never expires",
        exception(", expires: 2027-03-31"),
        ["7:5: missing key 'expires'"],
    ),
    (
        "a day that does not exist",
        exception("2027-03-31", "2027-02-30"),
        ["7:86: expires: expected a day that exists (like 2027-03-31); found '2027-02-30'"],
    ),
    (
        "a day with a time",
        exception("2027-03-31", "2027-03-31T10:00:00Z"),
        ["7:86: expires: expected a day that exists (like 2027-03-31); found '2027-03-31T10:00:00Z'"],
    ),
    (
        "a day that is a number",
        exception("2027-03-31", "20270331"),
        ["7:86: expires: expected a day that exists (like 2027-03-31); found 20270331"],
    ),
    (
        "an exception for everybody",
        exception("{tenant: t}", "{}"),
        ["7:29: when: expected at least one entry; found keys and values"],
    ),
    (
        "a context that is no mapping",
        exception("{tenant: t}", "med-atlas"),
        ["7:29: when: expected keys and values; found 'med-atlas'"],
    ),
    (
        "a context key in capitals",
        exception("tenant", "Tenant"),
        ["7:30: when: expected a name (like tenant); found 'Tenant'"],
    ),
    (
        "a context value that is a number",
        exception("tenant: t", "tenant: 7"),
        ["7:38: tenant: expected a list; found 7"],
    ),
    (
        "an exception that refuses",
        exception("flag", "refuse"),
        ["7:50: unknown action 'refuse'. Known: erase, flag."],
    ),
    (
        "an exception without effect",
        exception("flag", "erase"),
        ["7:50: erase excepts nothing from 'a', whose action is erase; choose a milder one"],
    ),
    (
        "an exception from no rule",
        exception("rules: a", "rules: []"),
        ["7:20: rules: expected at least one entry; found an empty list"],
    ),
    (
        "an exception from an unknown rule",
        exception("rules: a", "rules: [a, bb]"),
        ["7:24: unknown rule 'bb'. Known: a."],
    ),
    (
        "a concept of a rule that names one",
        exception("rules: a", "rules: a/nudity"),
        ["7:20: rule 'a' has no concept 'nudity' of its own. Write 'a'."],
    ),
    (
        "a concept that a category lacks",
        CHILD + EXCEPTION.replace("rules: a", "rules: art/nudity"),
        ["6:20: rule 'art' has no concept 'nudity' of its own. Known: banksy, van-gogh."],
    ),
    (
        "two exceptions share an id",
        exception() + EXCEPTION.splitlines()[1] + "\n",
        ["8:10: exception id 'x' is used twice"],
    ),
    (
        "an exception with an unknown key",
        exception("expires", "expire: 2026-01-01, expires"),
        [
            "7:77: unknown key 'expire'. Did you mean 'expires'? Known: action, expires, id, override, owner, reason, rules, when."
        ],
    ),
    (
        "a switch in a text",
        HEAD.replace("}", ", owner: No}") + RULE,
        [f"3:42: {SWITCH}"],
    ),
    (
        "a switch as a context value",
        exception("tenant: t", "tenant: on"),
        [f"7:38: {SWITCH}"],
    ),
    (
        "a switch as a key",
        exception("tenant: t", "no: t"),
        [f"7:30: {SWITCH}"],
    ),
    (
        "a URL",
        HEAD + "extends: https://example.com/p.yaml\n" + RULE,
        [
            "4:10: extends: 'https://example.com/p.yaml' is a URL, whose content can change; copy the policy beside this file and name the path"
        ],
    ),
    (
        "an unknown shipped policy",
        HEAD + "extends: builtin://strickt\n" + RULE,
        [
            f"4:10: extends: unknown shipped policy 'strickt'. Did you mean 'strict'?{SHIPPED} A path is written with its suffix, .yaml"
        ],
    ),
    (
        "a bare name that is not shipped",
        HEAD + "extends: [base.yaml, house]\n",
        [f"4:22: extends: unknown shipped policy 'house'.{SHIPPED} A path is written with its suffix, .yaml"],
    ),
    (
        "a parent that is not there",
        HEAD + "extends: ./nothing.yaml\n" + RULE,
        [
            f"4:10: extends: './nothing.yaml' does not exist; expected a path relative to this file, or the name of a shipped policy.{SHIPPED}"
        ],
    ),
    (
        "an absolute path",
        HEAD + "extends: /base.yaml\n" + RULE,
        [
            "4:10: extends: '/base.yaml' is not a relative path with forward slashes, which would mean the same on every machine"
        ],
    ),
    (
        "a path of Windows",
        HEAD + "extends: 'C:\\base.yaml'\n" + RULE,
        [
            "4:10: extends: 'C:\\\\base.yaml' is not a relative path with forward slashes, which would mean the same on every machine"
        ],
    ),
    (
        "a folder",
        HEAD + "extends: ./\n" + RULE,
        [
            f"4:10: extends: './' is a folder; expected a path relative to this file, or the name of a shipped policy.{SHIPPED}"
        ],
    ),
    (
        "a number as parent",
        HEAD + "extends: 5\n" + RULE,
        ["4:10: extends: expected a list; found 5"],
    ),
    (
        "a policy that extends itself",
        HEAD + "extends: p.yaml\n" + RULE,
        ["4:10: extends: a circle: p.yaml → p.yaml; a policy cannot extend itself"],
    ),
    (
        "too many parents",
        HEAD + f"extends: [{', '.join(['base.yaml'] * 17)}]\n",
        ["4:10: extends: expected at most 16 entries; found a list"],
    ),
    (
        "a milder action",
        CHILD + "rules:\n  - {id: art, action: erase}\n",
        [
            f"6:23: rule 'art': action erase is looser than refuse (FOLDER/base.yaml:11){LOOSER} and a reason in rule 'art'"
        ],
    ),
    (
        "less strength",
        CHILD + "rules:\n  - {id: skin, strength: 1.9}\n",
        [f"6:26: rule 'skin': strength 1.9 is looser than 2 (FOLDER/base.yaml:7){LOOSER} and a reason in rule 'skin'"],
    ),
    (
        "a milder mode",
        CHILD + "mode: observe\n",
        [f"5:7: mode observe is looser than enforce (built-in default){LOOSER} and a reason at the top of the file"],
    ),
    (
        "a milder default",
        CHILD + "defaults: {on_missing: flag}\n",
        [
            f"5:24: defaults.on_missing flag is looser than refuse-prompts (built-in default){LOOSER} and a reason at the top of the file"
        ],
    ),
    (
        "a rule that takes a concept over",
        CHILD + "rules:\n  - {id: b, concept: banksy, category: artist-style, action: flag}\n",
        [
            f"6:62: rule 'b' takes 'banksy' from 'art': action flag is looser than refuse (FOLDER/base.yaml:11){LOOSER} and a reason in rule 'b'"
        ],
    ),
    (
        "a branch that takes concepts over",
        CHILD + "rules:\n  - {id: b, concept: explicit/gore/*, category: explicit}\n",
        [
            f"6:5: rule 'b' takes 'gore' from 'skin': strength 1 is looser than 2 (FOLDER/base.yaml:7){LOOSER} and a reason in rule 'b'"
        ],
    ),
    (
        "an exception from an inherited rule",
        CHILD + EXCEPTION.replace("rules: a", "rules: art"),
        [f"6:5: exception 'x' from 'van-gogh' (rule 'art') is new{LOOSER} in this exception"],
    ),
    (
        "an exception for longer",
        CHILD + "exceptions:\n  - {id: atlas, expires: 2027-02-01}\n",
        [f"6:5: exception 'atlas' from 'nudity' (rule 'skin') allows more than before{LOOSER} in this exception"],
    ),
    (
        "an exception for more callers",
        CHILD + "exceptions:\n  - {id: atlas, when: {tenant: [a, b, c]}}\n",
        [f"6:5: exception 'atlas' from 'nudity' (rule 'skin') allows more than before{LOOSER} in this exception"],
    ),
    (
        "a rule that changes its concept",
        CHILD + "rules:\n  - {id: art, concept: van-gogh}\n",
        [f"6:24: no rule takes 'artist-style/*' any more, as rule 'art' did{LOOSER} and a reason in rule 'art'"],
    ),
    (
        "fewer tasks",
        CHILD + "rules:\n  - {id: skin, applies_to: txt2img}\n",
        [
            f"6:28: rule 'skin': applies_to [txt2img] is looser than [txt2img, img2img, inpaint, controlnet, video] (built-in default){LOOSER} and a reason in rule 'skin'"
        ],
    ),
    (
        "a narrower transport",
        CHILD + "rules:\n  - {id: skin, transport: {score: lexical, lo: 0.4, hi: 0.6, guidance: both}}\n",
        [
            f"6:35: rule 'skin': transport.score [lexical] is looser than [direction, lexical] (built-in default){LOOSER} and a reason in rule 'skin'",
            f"6:48: rule 'skin': transport.lo 0.4 is looser than 0.3 (FOLDER/base.yaml:5){LOOSER} and a reason in rule 'skin'",
            f"6:72: rule 'skin': transport.guidance both cannot be held against conditional (built-in default){LOOSER} and a reason in rule 'skin'",
        ],
    ),
    (
        "prompts kept in the log",
        CHILD + "audit: {text: full}\n",
        [
            f"5:15: audit.text full cannot be held against none (built-in default){LOOSER} and a reason at the top of the file"
        ],
    ),
]


@pytest.mark.parametrize(("text", "faults"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_a_fault_is_said_once_with_its_place(tmp_path: Path, text: str, faults: list[str]) -> None:
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyValidationError) as caught:
        load_policy(path, catalogue=CATALOGUE)
    found = [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]
    assert [fault.replace(str(tmp_path), "FOLDER") for fault in found] == faults


def test_the_table_is_as_long_as_promised() -> None:
    assert len({name for name, _, _ in FAULTS}) == len(FAULTS) >= 40


def test_the_faults_of_a_parent_are_told_with_those_of_the_child(tmp_path: Path) -> None:
    parent, child = tmp_path / "base.yaml", tmp_path / "p.yaml"
    parent.write_text(BASE.replace("action: refuse", "action: refuze"), encoding="utf-8")
    child.write_text(CHILD + "mode: enforced\n", encoding="utf-8")
    policy, problems = check_policy(child, catalogue=CATALOGUE)
    assert policy is None
    assert [str(problem) for problem in problems] == [
        f"{child}:5:7: unknown mode 'enforced'. Did you mean 'enforce'? Known: disabled, enforce, observe.",
        f"{parent}:11:13: unknown action 'refuze'. Did you mean 'refuse'? Known: erase, flag, refuse.",
    ]


def bomb(levels: int = 9) -> str:
    """A few hundred bytes of aliases that stand for 9^levels values."""
    lines = [f"a0: &a0 [{', '.join(['x'] * 9)}]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, levels)]
    return "\n".join(lines) + "\n"


BOMBS = [
    ("aliases", bomb(), "anchor &a0 is refused"),
    ("aliases by merge keys", "a: &a {x: 1}\n" + "b: {<<: [*a, *a]}\n" * 3000, "anchor &a is refused"),
    ("brackets", "a: " + "[" * 100_000, "nested deeper than 32 levels"),
    ("braces", "{a: " * 50_000, "nested deeper than 32 levels"),
    ("indentation", "".join(" " * k + "a:\n" for k in range(500)), "nested deeper than 32 levels"),
    ("values", "a: [" + "1," * 120_000 + "]", "more than 20000 values"),
    ("keys", "".join(f"k{k}: 1\n" for k in range(20_001)), "more than 20000 values"),
    ("a file that is too long", HEAD + "#" * 300_000, "larger than 256 KiB"),
    ("NUL", HEAD + "\0", "not YAML"),
]


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in BOMBS], ids=[case[0] for case in BOMBS])
def test_bombs_are_refused_before_they_expand(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PolicySyntaxError, match=message):
        load_policy(path, catalogue=CATALOGUE)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 256 << 20  # the first one stands for gigabytes


@pytest.mark.parametrize("digits", [30, 5000, 200_000])
def test_a_huge_number_is_a_fault_like_any_other(tmp_path: Path, digits: int) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(HEAD + rule(strength="9" * digits), encoding="utf-8")
    with pytest.raises(PolicyValidationError, match=r"5:60: strength: expected less than or equal to 4; found "):
        load_policy(path, catalogue=CATALOGUE)


def test_parents_are_capped_in_depth_and_number(tmp_path: Path) -> None:
    for k in range(10):
        text = HEAD + (f"extends: p{k - 1}.yaml\n" if k else RULE)
        (tmp_path / f"p{k}.yaml").write_text(text, encoding="utf-8")
    assert load_policy(tmp_path / "p8.yaml", catalogue=CATALOGUE).rules[0].id == "a"
    with pytest.raises(PolicyValidationError, match="more than 8 deep"):
        load_policy(tmp_path / "p9.yaml", catalogue=CATALOGUE)
    for name, parents in (("x", range(16)), *((f"x{k}", range(16 * k, 16 * k + 16)) for k in range(16))):
        leaves = [f"x{k}" if name == "x" else f"leaf{k}" for k in parents]
        (tmp_path / f"{name}.yaml").write_text(HEAD + f"extends: [{', '.join(f'{n}.yaml' for n in leaves)}]\n", "utf-8")
    for k in range(256):
        (tmp_path / f"leaf{k}.yaml").write_text(HEAD + RULE, encoding="utf-8")
    with pytest.raises(PolicyValidationError, match="more than 64 files"):
        load_policy(tmp_path / "x.yaml", catalogue=CATALOGUE)


def test_a_circle_is_found_wherever_it_closes(tmp_path: Path) -> None:
    for name, parent in (("p", "a"), ("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(HEAD + f"extends: ./{parent}.yaml\n" + RULE, encoding="utf-8")
    with pytest.raises(PolicyValidationError) as caught:
        load_policy(tmp_path / "p.yaml", catalogue=CATALOGUE)
    (fault,) = map(str, caught.value.problems)
    assert fault == (
        f"{tmp_path / 'b.yaml'}:4:10: extends: a circle: a.yaml → b.yaml → a.yaml; a policy cannot extend itself"
    )
