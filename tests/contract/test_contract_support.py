"""docs/support.md says what the suite proves."""

from __future__ import annotations

from contract_cases import CASES, FEATURES
from contract_support import PAGE, render


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == render(), "run `python tests/contract/contract_support.py`"


def test_every_refusal_names_a_feature_of_the_suite() -> None:
    render()  # loads the suite
    assert {name for case in CASES for name in case.refused} <= set(FEATURES)
    assert len({case.name for case in CASES}) == len(CASES) >= 12
