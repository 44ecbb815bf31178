"""`safegen test`: whether policies find what they must find, and leave alone what they must leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegen.cli import options
from safegen.cli.render import say, show, show_json

if TYPE_CHECKING:
    from safegen.cli.reports import Checked, Reported
    from safegen.policy.schema import Policy
    from safegen.policy.testing import Judge, RuleCoverage, Suite

EXAMPLE = "Example: safegen test strict --junit report.xml"

SARIF_RULES = {
    "case-failed": "A prompt has another verdict than its case expects.",
    "no-cases": "A policy without test cases.",
    "not-covered": "A rule without a case that opens it, or without one that leaves it shut.",
}

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH…", help="Policies, files of cases (*.policytest.yaml), folders, or names of shipped policies."
    ),
]
GateModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help='Judge with the whole gate of an image model: "mini", a diffusers pipeline folder, or a hub id.',
        show_default="by words alone",
    ),
]
FailUnder = Annotated[
    float,
    typer.Option("--fail-under", min=0, max=100, help="Percent of the rules that must be covered by cases."),
]


def run_tests(
    paths: Paths,
    model: GateModel = None,
    revision: options.Revision = None,
    membranes: options.Membranes = None,
    fail_under: FailUnder = 100,
    junit: options.Junit = None,
    sarif: options.Sarif = None,
    as_json: options.AsJson = False,
) -> None:
    """Run policy tests: exit code 1 if a case fails, if there are no cases, or if rules are not covered.

    A rule is covered when one case expects it to open and another to stay shut.
    """
    from safegen.policy.testing import WordsJudge, run_cases

    if model is None:
        suites = run_cases(paths, lambda _path, policy: WordsJudge(policy))
    else:
        suites = run_cases(paths, _GateJudges(model, revision, membranes or []).judge_of)
    if junit is not None:
        from safegen.cli.reports import write_junit

        write_junit(junit, [(suite.path, _checked(suite)) for suite in suites])
    if sarif is not None:
        from safegen.cli.reports import write_sarif

        write_sarif(sarif, SARIF_RULES, [one for suite in suites for one in _reported(suite)])
    rules = [rule for suite in suites for rule in suite.coverage]
    share = 100 * sum(rule.covered for rule in rules) / len(rules)
    ok = all(suite.cases and not suite.failed for suite in suites) and share >= fail_under
    if as_json:
        show_json({"ok": ok, "coverage": share, "suites": [_values(suite) for suite in suites]})
    else:
        _print(suites, share)
    if not ok:
        raise typer.Exit(1)


class _GateJudges:
    """Makes judges that share one model, which is loaded when the first is needed."""

    def __init__(self, model: str, revision: str | None, membranes: Sequence[Path]) -> None:
        self._model, self._revision, self._membranes = model, revision, membranes
        self._pipe: object = None

    def judge_of(self, path: Path, policy: Policy) -> Judge:
        from safegen.cli.host import load_host

        self._pipe = self._pipe or load_host(self._model, self._revision)

        from safegen.cli.gate_judge import GateJudge

        return GateJudge(self._pipe, path, policy, self._membranes)


def _missing(rule: RuleCoverage) -> str:
    lacks = [kind for kind, count in (("opens it", rule.opening), ("leaves it shut", rule.closing)) if not count]
    return f"rule {rule.rule!r} is not covered: no case {' and none '.join(lacks)}"


def _reported(suite: Suite) -> list[Reported]:
    """Returns what is wrong with a suite."""
    from safegen.cli.reports import Reported

    if not suite.cases:
        return [Reported("no-cases", "error", f"policy {suite.policy.metadata.id!r} has no test cases", suite.path)]
    failed = [
        Reported("case-failed", "error", f"{case.name}: {text}", suite.path, case.place.line, case.place.column)
        for case in suite.failed
        for text in case.failures
    ]
    bare = [rule for rule in suite.coverage if not rule.covered]
    return failed + [Reported("not-covered", "warning", _missing(rule), suite.path) for rule in bare]


def _checked(suite: Suite) -> list[Checked]:
    """Returns the cases of a suite, and the coverage of each rule, as things that were tested."""
    from safegen.cli.reports import Checked

    if not suite.cases:
        return [Checked("cases", 1, (f"policy {suite.policy.metadata.id!r} has no test cases",))]
    cases = [Checked(case.name, case.place.line, case.failures) for case in suite.cases]
    return cases + [
        Checked(f"coverage of rule {rule.rule}", 1, () if rule.covered else (_missing(rule),))
        for rule in suite.coverage
    ]


def _values(suite: Suite) -> dict[str, object]:
    return {
        "file": str(suite.path),
        "policy": suite.policy.metadata.id,
        "cases": [
            {
                "name": case.name,
                "line": case.place.line,
                "column": case.place.column,
                "passed": not case.failures,
                "failures": list(case.failures),
            }
            for case in suite.cases
        ],
        "rules": [
            {"rule": rule.rule, "opening": rule.opening, "closing": rule.closing, "covered": rule.covered}
            for rule in suite.coverage
        ],
    }


def _print(suites: Sequence[Suite], share: float) -> None:
    for suite in suites:
        for one in _reported(suite):
            show(f"{one.path}:{one.line}:{one.column}: {one.message}")
        covered = sum(rule.covered for rule in suite.coverage)
        show(
            f"{suite.path}: {len(suite.cases)} cases, {len(suite.failed)} failed; "
            f"{covered} of {len(suite.coverage)} rules covered"
        )
    cases = sum(len(suite.cases) for suite in suites)
    failed = sum(len(suite.failed) for suite in suites)
    say(f"{cases} cases, {cases - failed} passed, {failed} failed; {share:.0f} % of the rules covered")
