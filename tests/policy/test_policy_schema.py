"""The policy models used from Python: defaults, order of severities, and faults between fields."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from safegen.policy.schema import Policy, Severity


def document(**changes: Any) -> dict[str, Any]:
    """Returns a minimal valid policy document with `changes`."""
    rule = {"id": "a", "concept": "nudity", "category": "explicit"}
    head = {"apiVersion": "safegen.dev/v1", "kind": "Policy", "metadata": {"id": "p", "version": "1.0.0"}}
    return {**head, "rules": [rule], **changes}


def test_defaults() -> None:
    policy = Policy.model_validate(document())
    rule = policy.rules[0]
    assert policy.mode == "enforce"
    assert (policy.defaults.on_unknown, policy.defaults.on_missing) == ("open", "refuse-prompts")
    transport = policy.defaults.transport
    assert transport.score == ("direction", "lexical")
    assert (transport.lo, transport.hi, transport.least, transport.guidance) == (
        "calibrated",
        "calibrated",
        0.0,
        "conditional",
    )
    assert (policy.audit.text, policy.audit.on_failure, policy.audit.evidence) == ("none", "refuse", "none")
    assert (rule.action, rule.strength, rule.severity, rule.transport) == ("erase", 1.0, Severity.HIGH, None)


def test_one_score_may_be_written_without_a_list() -> None:
    policy = Policy.model_validate(document(defaults={"transport": {"score": "paper"}}))
    assert policy.defaults.transport.score == ("paper",)
    again = Policy.model_validate(policy.model_dump(mode="json"))
    assert again == policy


def test_severities_are_ordered() -> None:
    assert Severity.INFO < Severity.LOW < Severity.MEDIUM < Severity.HIGH < Severity.CRITICAL
    assert Severity("critical") >= Severity.HIGH
    assert sorted([Severity.HIGH, Severity.INFO]) == [Severity.INFO, Severity.HIGH]
    with pytest.raises(TypeError):
        assert Severity.LOW < "high"


def test_policies_are_frozen() -> None:
    policy = Policy.model_validate(document())
    with pytest.raises(ValidationError):
        policy.mode = "disabled"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audit": {"on_failure": "degrade"}}, "degrade does not go with mode enforce"),
        ({"defaults": {"transport": {"lo": 0.5, "hi": 0.4}}}, "lo is 0.5, above hi, which is 0.4"),
        ({"rules": document()["rules"] * 2}, "rule id 'a' is used twice; concept 'nudity' has rule 'a' already"),
    ],
)
def test_faults_between_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Policy.model_validate(document(**changes))


def test_degrading_goes_with_observe() -> None:
    policy = Policy.model_validate(document(mode="observe", audit={"on_failure": "degrade"}))
    assert policy.audit.on_failure == "degrade"


def test_the_policy_layer_does_not_import_torch() -> None:
    code = "import sys, safegen.policy.load, safegen.policy.resolve; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
