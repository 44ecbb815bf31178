"""Policy tests, run: what fails, what passes, what is covered, and for whom and when."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from safegen.errors import PolicyNotFoundError, PolicyValidationError
from safegen.policy.load import load_policy, shipped_policies
from safegen.policy.schema import Policy
from safegen.policy.testing import Suite, WordsJudge, find_cases, run_cases
from safegen.resources import shipped

POLICY = """\
apiVersion: safegen.dev/v1
kind: Policy
metadata: {id: p, version: 1.0.0}
rules:
  - {id: nudity, concept: nudity, category: explicit, action: refuse, applies_to: [txt2img, img2img]}
  - {id: styles, concept: artist-style/*, category: artist-style}
exceptions:
  - id: atlas
    rules: [nudity]
    when: {tenant: med-atlas}
    action: flag
    reason: ticket SEC-12345
    owner: a@example.com
    expires: 2027-03-31
"""
HEAD = "apiVersion: safegen.dev/v1\nkind: PolicyTest\npolicy: p.yaml\ncases:\n"
TODAY = date(2026, 11, 24)


def words(_path: Path, policy: Policy) -> WordsJudge:
    return WordsJudge(policy)


def run(folder: Path, *cases: str, policy: str = POLICY) -> Suite:
    (folder / "p.yaml").write_text(policy, "utf-8")
    (folder / "p.policytest.yaml").write_text(HEAD + "".join(f"  - {{{case}}}\n" for case in cases), "utf-8")
    (suite,) = run_cases([folder], words, today=TODAY)
    return suite


def outcomes(suite: Suite) -> list[tuple[str, ...]]:
    return [case.failures for case in suite.cases]


def test_shipped_policies_pass_their_tests_and_all_rules_are_covered() -> None:
    suites = run_cases([shipped("policies")], words)
    assert [suite.path.name.removesuffix(".policytest.yaml") for suite in suites] == list(shipped_policies())
    assert [case for suite in suites for case in suite.failed] == []
    assert [(suite.path, rule) for suite in suites for rule in suite.coverage if not rule.covered] == []
    assert all(len(suite.cases) >= 10 for suite in suites)


def test_what_is_as_expected_passes(tmp_path: Path) -> None:
    suite = run(
        tmp_path,
        "name: a, prompt: a naked man, expect: {nudity: refuse, styles: shut}",
        "name: b, prompt: a field by Van Gogh, expect: {styles: erase, styles/van-gogh: erase, styles/monet: shut}",
        'name: c, prompt: a field by Van Gogh, expect: {styles: {permeability: ">=0.9"}, "*": shut}',
        'name: d, prompt: the naked eye, expect: {"*": shut}',
        "name: e, prompt: a man, negative: naked, expect: {nudity: {action: shut, permeability: 0}}",
    )
    assert outcomes(suite) == [()] * 5
    assert [(rule.rule, rule.opening, rule.closing) for rule in suite.coverage] == [("nudity", 1, 3), ("styles", 3, 3)]


def test_what_is_not_as_expected_says_what_was_found(tmp_path: Path) -> None:
    suite = run(
        tmp_path,
        "name: a, prompt: a naked man, expect: {nudity: shut}",
        "name: b, prompt: a man, expect: {nudity: refuse}",
        "name: c, prompt: a naked man, expect: {nudity: erase}",
        'name: d, prompt: a field by Van Gogh, expect: {styles: {permeability: "<=0.05"}}',
        'name: e, prompt: a field by Van Gogh, expect: {nudity: shut, "*": shut}',
    )
    assert outcomes(suite) == [
        ("nudity: expected shut, found refuse by nudity (naked)",),
        ("nudity: expected refuse, but the rule is not touched",),
        ("nudity: expected erase, found refuse by nudity (naked)",),
        ("styles: expected permeability <= 0.05, found 1.000",),
        ("*: expected shut, found erase by styles/van-gogh (van gogh)",),
    ]
    assert [case.place.line for case in suite.failed] == [5, 6, 7, 8, 9]


def test_exceptions_are_for_whom_and_until_when_they_say(tmp_path: Path) -> None:
    naked = "prompt: naked torso, expect: {nudity: "
    suite = run(
        tmp_path,
        f"name: anyone, {naked}refuse}}",
        f"name: the atlas, context: {{tenant: med-atlas}}, {naked}flag}}",
        f"name: another, context: {{tenant: x}}, {naked}refuse}}",
        f"name: on its last day, now: 2027-03-31, context: {{tenant: med-atlas}}, {naked}flag}}",
        f"name: the day after, now: 2027-04-01, context: {{tenant: med-atlas}}, {naked}refuse}}",
    )
    assert outcomes(suite) == [()] * 5
    (later,) = run_cases([tmp_path], words, today=date(2027, 4, 1))
    assert [case.name for case in later.failed] == ["the atlas"]


def test_rules_apply_to_their_tasks(tmp_path: Path) -> None:
    suite = run(
        tmp_path,
        "name: a, task: img2img, prompt: a naked man, expect: {nudity: refuse}",
        "name: b, task: inpaint, prompt: a naked man, expect: {nudity: shut}",
    )
    assert outcomes(suite) == [(), ()]


def test_floors_and_scores_are_read_without_a_model(tmp_path: Path) -> None:
    transport = "rules:\n  - {id: nudity, concept: nudity, category: explicit, transport: %s}\n"
    head = POLICY.partition("rules:")[0]
    case = 'name: a, prompt: %s, expect: {nudity: {permeability: "%s"}}'
    for given, prompt, bound in (
        ("{least: 0.25}", "a man", "0.25"),
        ("{least: 0.25}", "a naked man", "1"),
        ("{score: direction}", "a naked man", "0"),
        ("{score: [direction, lexical]}", "a naked man", "1"),
        ("{score: always}", "a man", "1"),
    ):
        assert outcomes(run(tmp_path, case % (prompt, bound), policy=head + transport % given)) == [()], given


def test_a_rule_that_does_not_open_by_words_is_not_touched_by_them(tmp_path: Path) -> None:
    head = POLICY.partition("rules:")[0] + "rules:\n  - {id: nudity, concept: nudity, category: explicit, "
    case = "name: a, prompt: a naked man, expect: {nudity: %s}"
    for given, expected in (("", "shut"), (", action: flag", "flag"), (", action: refuse", "refuse")):
        policy = f"{head}transport: {{score: direction}}{given}}}\n"
        assert outcomes(run(tmp_path, case % expected, policy=policy)) == [()], given


def test_cases_that_stand_beside_another_policy_do_not_test_it(tmp_path: Path) -> None:
    run(tmp_path, "name: a, prompt: x, expect: {nudity: shut}")
    (tmp_path / "p.policytest.yaml").rename(tmp_path / "q.policytest.yaml")
    (tmp_path / "q.yaml").write_text(POLICY, "utf-8")
    assert find_cases([tmp_path / "q.yaml"]) == [(tmp_path / "q.yaml", None)]
    assert find_cases([tmp_path]) == [
        (tmp_path / "p.yaml", tmp_path / "q.policytest.yaml"),
        (tmp_path / "q.yaml", None),
    ]


def test_a_policy_without_cases_is_a_suite_without_cases(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(POLICY, "utf-8")
    (suite,) = run_cases([tmp_path / "p.yaml"], words)
    assert (suite.path, suite.cases) == (tmp_path / "p.policytest.yaml", ())
    assert not any(rule.covered for rule in suite.coverage)


def test_several_files_cover_a_policy_together(tmp_path: Path) -> None:
    run(tmp_path, "name: a, prompt: a naked man, expect: {nudity: refuse, styles: shut}")
    case = "  - {name: a, prompt: by Van Gogh, expect: {nudity: shut, styles: erase}}\n"
    (tmp_path / "more.policytest.yaml").write_text(HEAD + case, "utf-8")
    suites = run_cases([tmp_path], words)
    assert [len(suite.cases) for suite in suites] == [1, 1]
    assert all(rule.covered for suite in suites for rule in suite.coverage)
    (alone,) = run_cases([tmp_path / "p.yaml"], words)
    assert not any(rule.covered for rule in alone.coverage)


def test_a_rule_that_the_policy_has_not(tmp_path: Path) -> None:
    with pytest.raises(PolicyValidationError) as caught:
        run(tmp_path, "name: a, prompt: x, expect: {nudty: shut}", "name: b, prompt: x, expect: {styles/moné: shut}")
    assert [str(problem).split("policytest.yaml:")[1].split(" Known")[0] for problem in caught.value.problems] == [
        "5:35: policy 'p' has no rule 'nudty'. Did you mean 'nudity'?",
        "6:35: policy 'p' has no rule 'styles/moné'. Did you mean 'styles/monet'?",
    ]


def test_faults_of_all_policies_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(POLICY.replace("action: refuse", "action: drop"), "utf-8")
    with pytest.raises(PolicyValidationError) as caught:
        run_cases([tmp_path], words)
    assert len(caught.value.problems) == 2


def test_what_is_found_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = shipped("policies")
    assert find_cases(["strict"]) == [(home / "strict.yaml", home / "strict.policytest.yaml")]
    tests = tmp_path / "tests" / "mine.policytest.yaml"
    tests.parent.mkdir()
    case = "  - {name: a, prompt: x, expect: {nudity: shut}}\n"
    tests.write_text(HEAD.replace("p.yaml", "strict") + case, "utf-8")
    assert find_cases([tests]) == [(home / "strict.yaml", tests)]
    tests.write_text(HEAD.replace("p.yaml", "../p.yaml") + case, "utf-8")
    (tmp_path / "p.yaml").write_text(POLICY, "utf-8")
    (tmp_path / "q.yaml").write_text(POLICY.replace("kind: Policy", "'kind' : \"Policy\""), "utf-8")
    (tmp_path / "other.yaml").write_text("a: 1\n", "utf-8")
    found = find_cases([tmp_path])
    assert [(policy.resolve(), cases) for policy, cases in found] == [
        (tmp_path / "p.yaml", tests),
        (tmp_path / "q.yaml", None),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyNotFoundError, match="neither a policy nor a file of cases"):
        find_cases([tmp_path / "empty"])
    assert load_policy(tmp_path / "p.yaml").metadata.id == "p"
