"""What must hold for every policy: strictness is transitive, resolving is deterministic, layout changes nothing."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from safegen.policy.catalogue import Catalogue, Concept
from safegen.policy.document import parse_document
from safegen.policy.fields import TASKS
from safegen.policy.format import formatted
from safegen.policy.resolve import resolve
from safegen.policy.schema import Policy
from safegen.policy.tighten import looser

CONCEPTS = [
    Concept(id=f"{root}-{k}", name=f"{root} {k} name", category=f"{root}/{'ab'[k % 2]}")
    for root in ("explicit", "custom")
    for k in range(3)
]
CATALOGUE = Catalogue({c.id: c for c in CONCEPTS}, frozenset(c.id for c in CONCEPTS))
NOW = datetime(2026, 6, 1, tzinfo=UTC)
NAMES = [*CATALOGUE.concepts, "explicit/*", "explicit/a/*", "custom/*", "custom/b/*"]


def concept_of(rule: dict[str, Any]) -> str:
    return rule["concept"]


transports = st.fixed_dictionaries(
    {},
    optional={
        "score": st.sampled_from([["lexical"], ["direction"], ["direction", "lexical"], "paper"]),
        "least": st.sampled_from([0.0, 0.25, 0.5]),
        "guidance": st.sampled_from(["both", "conditional"]),
    },
) | st.sampled_from([{"lo": 0.1, "hi": 0.5}, {"lo": 0.2, "hi": 0.5}, {"lo": 0.2, "hi": 0.6}])
rules: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
    st.fixed_dictionaries(
        {"concept": st.sampled_from(NAMES)},
        optional={
            "action": st.sampled_from(["flag", "erase", "refuse"]),
            "severity": st.sampled_from(["low", "high"]),
            "strength": st.sampled_from([0.5, 1.0, 2.0]),
            "on_missing": st.sampled_from(["flag", "refuse-prompts"]),
            "applies_to": st.lists(st.sampled_from(TASKS), min_size=1, max_size=3),
            "transport": transports,
        },
    ),
    min_size=1,
    max_size=4,
    unique_by=concept_of,
)
days = st.dates(date(2026, 5, 1), date(2026, 7, 1)).map(lambda day: day.isoformat())
callers = st.sampled_from(
    [{}, *({"tenant": t} for t in "ab"), *({"route": r} for r in "ab"), *({"tenant": t, "route": "a"} for t in "ab")]
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    chosen = [
        {"id": rule["concept"].replace("/*", "").replace("/", "-") + "-rule", "category": "custom", **rule}
        for rule in draw(rules)
    ]
    document: dict[str, Any] = {
        "apiVersion": "safegen.dev/v1",
        "kind": "Policy",
        "metadata": {"id": "p", "version": "1.0.0"},
        "mode": draw(st.sampled_from(["disabled", "observe", "enforce"])),
        "defaults": {"on_unknown": draw(st.sampled_from(["open", "refuse"]))},
        "rules": chosen,
    }
    erasing = [rule["id"] for rule in chosen if rule.get("action", "erase") != "flag"]
    if erasing:
        document["exceptions"] = [
            {
                "id": f"x{k}",
                "rules": draw(st.lists(st.sampled_from(erasing), min_size=1, max_size=2)),
                "when": draw(callers.filter(bool)),
                "action": "flag",
                "reason": "r",
                "owner": "o",
                "expires": draw(days),
            }
            for k in range(draw(st.integers(0, 2)))
        ]
    return document


policies = documents().map(Policy.model_validate)


def digest(policy: Policy) -> str:
    return resolve(policy, CATALOGUE, available={"explicit-0"}, now=NOW).digest


@settings(max_examples=100, deadline=None)
@given(policies, policies, policies)
def test_what_is_nowhere_looser_stays_so(first: Policy, second: Policy, third: Policy) -> None:
    assert not looser(first, first, CATALOGUE)
    if not looser(first, second, CATALOGUE) and not looser(second, third, CATALOGUE):
        assert not looser(first, third, CATALOGUE)


@settings(max_examples=100, deadline=None)
@given(policies, st.data())
def test_a_chain_of_tightenings_is_a_tightening(policy: Policy, data: st.DataObject) -> None:
    """Random triples are seldom comparable; these are, step by step."""
    chain = [policy]
    for _ in range(2):
        chain.append(tightened(chain[-1], data))
        assert not looser(chain[-2], chain[-1], CATALOGUE)
    assert not looser(chain[0], chain[2], CATALOGUE)


def tightened(policy: Policy, data: st.DataObject) -> Policy:
    """Returns a policy in which one thing is stricter."""
    document = policy.model_dump(mode="json", exclude_unset=True)
    rule = data.draw(st.sampled_from(document["rules"]))
    step = data.draw(st.sampled_from(["mode", "strength", "severity", "least", "exceptions", "on_unknown", "expires"]))
    if step == "mode":
        document["mode"] = "enforce"
    elif step == "on_unknown":
        document["defaults"]["on_unknown"] = "refuse"
    elif step == "strength":
        rule["strength"] = min(4.0, 2 * rule.get("strength", 1.0))
    elif step == "severity":
        rule["severity"] = "critical"
    elif step == "least":
        transport = rule.setdefault("transport", {})
        transport["least"] = min(1.0, transport.get("least", 0.0) + 0.25)
    elif step == "exceptions":
        document.pop("exceptions", None)
    for exception in document.get("exceptions", []) if step == "expires" else []:
        exception["expires"] = "2026-05-01"
    return Policy.model_validate(document)


@settings(max_examples=100, deadline=None)
@given(policies, callers, st.dates(date(2026, 5, 1), date(2026, 7, 2)))
def test_resolving_is_deterministic_and_an_exception_only_makes_milder(
    policy: Policy, caller: dict[str, str], day: date
) -> None:
    now = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
    first = resolve(policy, CATALOGUE, available={"explicit-0"}, now=now, context=caller)
    assert first == resolve(
        policy, CATALOGUE, available=["explicit-0"], now=now, context=dict(reversed(caller.items()))
    )
    gravity = ("flag", "erase", "refuse")
    for rule, plain in zip(first.rules, first.every_rule, strict=True):
        assert gravity.index(rule.effective) <= gravity.index(plain.effective)
        holding = [one for one in first.exceptions if rule.id in one.rules and one.holds(caller, day)]
        assert (rule.exception is not None) is bool(holding)
        assert all(day <= one.stated.expires for one in holding)


def shuffled(value: Any, data: st.DataObject) -> Any:
    """Returns a document with the keys of every mapping in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key], data) for key in data.draw(st.permutations(sorted(value)))}
    return [shuffled(item, data) for item in value] if isinstance(value, list) else value


@settings(max_examples=60, deadline=None)
@given(documents(), st.data())
def test_the_digest_does_not_depend_on_the_order_of_keys(document: dict[str, Any], data: st.DataObject) -> None:
    assert digest(Policy.model_validate(shuffled(document, data))) == digest(Policy.model_validate(document))


comments = st.text("abc #:-'\"éß猫", min_size=1, max_size=12).map(lambda text: "# " + text.strip())


@st.composite
def written(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A document as someone might type it: blocks and brackets, odd indentation, spaces, comments and blank lines."""
    lines: list[str] = []
    said: list[str] = []

    def remark() -> str:
        said.append(f"{draw(comments)} {len(said)}")
        return said[-1]

    for key, value in draw(documents()).items():
        if draw(st.booleans()):
            lines += [""] * draw(st.integers(0, 2)) + [remark()]
        tail = "  " + remark() if draw(st.booleans()) else ""
        if isinstance(value, list) and value and draw(st.booleans()):
            indent = " " * draw(st.integers(0, 5))
            lines.append(f"{key}:{tail}")
            for entry in value:
                after = " " * draw(st.integers(1, 4)) + remark() if draw(st.booleans()) else ""
                lines.append(f"{indent}-{' ' * draw(st.integers(1, 3))}{json.dumps(entry)}{after}")
                lines += [""] * draw(st.integers(0, 1))
        else:
            lines.append(f"{key}:{' ' * draw(st.integers(1, 3))}{json.dumps(value)}{tail}")
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return end.join(lines) + end * draw(st.integers(0, 3)), said


@settings(max_examples=80, deadline=None)
@given(written())
def test_layout_is_idempotent_and_keeps_what_is_said(sample: tuple[str, list[str]]) -> None:
    text, said = sample
    after = formatted(text, "p.yaml")
    assert formatted(after, "p.yaml") == after
    before, content = parse_document(text, "p.yaml").value, parse_document(after, "p.yaml").value
    assert repr(content) == repr(before)  # 1, 1.0 and true are equal, but not the same
    assert digest(Policy.model_validate(content)) == digest(Policy.model_validate(before))
    assert re.findall(r" (\d+)$", "\n".join(line for line in after.split("\n") if "# " in line), re.MULTILINE) == [
        remark.rsplit(" ", 1)[1] for remark in said
    ]
    assert [line for line in after.split("\n") if line != line.rstrip()] == []
