"""Files of policy tests: what they may say, and every fault with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from safegen.errors import PolicyValidationError
from safegen.policy.cases import Bound, Case, CaseFile, Expected, read_cases
from safegen.policy.catalogue import Concept, ConceptFile

HEAD = "apiVersion: safegen.dev/v1\nkind: PolicyTest\npolicy: p.yaml\n"
CASE = "  - {name: a, prompt: x, expect: {nudity: erase}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "p.policytest.yaml"
    path.write_text(text, "utf-8")
    return path


def test_a_case_says_all_that_a_run_needs(tmp_path: Path) -> None:
    text = HEAD + (
        "now: 2026-11-24\n"
        "cases:\n"
        "  - name: anatomy\n"
        "    prompt: naked torso\n"
        "    negative: blurry\n"
        "    context: {tenant: med-atlas}\n"
        "    task: img2img\n"
        "    now: 2027-04-01\n"
        '    expect: {nudity: {action: flag, permeability: "<= 0.05"}, "*": shut}\n'
    )
    content = read_cases(write(tmp_path, text)).content
    (case,) = content.cases
    assert (str(content.now), str(case.now), case.task, case.negative) == (
        "2026-11-24",
        "2027-04-01",
        "img2img",
        "blurry",
    )
    assert case.context == {"tenant": "med-atlas"}
    assert case.expect["nudity"] == Expected(action="flag", permeability=Bound("<=", 0.05))
    assert case.expect["*"] == Expected(action="shut")


@pytest.mark.parametrize(
    ("bound", "holds", "fails"),
    [
        (Bound(">=", 0.8), (0.8, 1.0), (0.79, 0.0)),
        (Bound("<=", 0.05), (0.0, 0.05), (0.06, 1.0)),
        (Bound(">", 0.5), (0.51,), (0.5,)),
        (Bound("<", 0.5), (0.49,), (0.5,)),
        (Bound("==", 1.0), (1.0, 1 - 1e-7), (0.999,)),
    ],
)
def test_bounds(bound: Bound, holds: tuple[float, ...], fails: tuple[float, ...]) -> None:
    assert all(bound.holds(value) for value in holds)
    assert not any(bound.holds(value) for value in fails)


@pytest.mark.parametrize(
    ("expected", "opens", "shuts"),
    [
        ({"action": "erase"}, True, False),
        ({"action": "flag"}, True, False),
        ({"action": "shut"}, False, True),
        ({"permeability": ">=0.8"}, True, False),
        ({"permeability": "<=0.05"}, False, True),
        ({"permeability": 1}, True, False),
        ({"permeability": "<= 1"}, False, False),
        ({"action": "flag", "permeability": 0}, True, False),
    ],
)
def test_what_counts_as_opening_and_as_closing(expected: dict[str, object], opens: bool, shuts: bool) -> None:
    read = Expected.model_validate(expected)
    assert (read.opens, read.shuts) == (opens, shuts)


FAULTS = [
    (
        HEAD.replace("PolicyTest", "Policy") + "cases:\n" + CASE,
        "2:7: unknown kind 'Policy'. Did you mean 'PolicyTest'?",
    ),
    (HEAD.replace("policy: p.yaml\n", "") + "cases:\n" + CASE, "1:1: missing key 'policy'"),
    (HEAD + "case:\n" + CASE, "4:1: unknown key 'case'. Did you mean 'cases'?"),
    (HEAD + "cases:\n" + CASE + CASE, "6:12: case 'a' is there already; names are unique"),
    (HEAD + "cases:\n" + CASE.replace("prompt: x, ", ""), "5:5: missing key 'prompt'"),
    (HEAD + "cases:\n" + CASE.replace("{nudity: erase}", "{}"), "5:34: expect: expected at least one entry"),
    (
        HEAD + "cases:\n" + CASE.replace("erase", "open"),
        "5:43: action: expected 'erase', 'refuse', 'flag' or 'shut'",
    ),
    (
        HEAD + "cases:\n" + CASE.replace("erase", "{}"),
        "5:43: nudity: expected an action or a bound on the permeability",
    ),
    (
        HEAD + "cases:\n" + CASE.replace("erase", "{permeability: most}"),
        "5:58: permeability: expected a number from 0 to 1, with >=, <=, > or < before it (in quotes); found 'most'",
    ),
    (HEAD + "cases:\n" + CASE.replace("erase", "{permeability: 1.5}"), "5:58: permeability: expected a number from 0"),
    (HEAD + "cases:\n" + CASE.replace("nudity", '"*"'), '5:40: "*" stands for every rule, and no prompt touches all'),
    (HEAD + "cases:\n" + CASE.replace("x,", "x, task: draw,"), "5:32: unknown task 'draw'."),
    (HEAD + "cases:\n" + CASE.replace("x,", "x, now: soon,"), "5:31: now: expected a day that exists"),
]


@pytest.mark.parametrize(("text", "fault"), FAULTS)
def test_faults_have_places(tmp_path: Path, text: str, fault: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PolicyValidationError) as caught:
        read_cases(path)
    assert str(caught.value.problems[0]).removeprefix(f"{path}:").startswith(fault), caught.value


def test_every_key_is_documented() -> None:
    docs = Path(__file__).parent.parent.parent / "docs"
    for page, models in (
        ("how-to/test-a-policy.md", (Case, CaseFile, Expected)),
        ("reference/catalogue.md", (Concept, ConceptFile)),
    ):
        text = (docs / page).read_text("utf-8")
        assert [name for model in models for name in model.model_fields if f"{name}" not in text] == [], page
