"""Exceptions and tasks: for whom, until when, and what is left of a rule."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from policy_samples import CATALOGUE, HEAD

import safegen
from safegen.errors import UsageError
from safegen.policy.context import current, request_context
from safegen.policy.hits import lexical_hits
from safegen.policy.load import load_policy
from safegen.policy.resolve import ResolvedPolicy, resolve

NOW = datetime(2026, 6, 1, tzinfo=UTC)
TEXT = (
    HEAD
    + """\
rules:
  - {id: skin, concept: explicit/*, category: explicit, action: refuse}
  - {id: art, concept: artist-style/*, category: artist-style}
  - {id: idol, concept: pikachu, category: ip-character, applies_to: [img2img, inpaint]}
exceptions:
  - id: atlas
    rules: skin/nudity
    when: {tenant: [a, b], route: /atlas}
    action: flag
    reason: r
    owner: o
    expires: 2026-12-31
  - {id: soft, rules: skin, when: {tenant: a}, action: erase, reason: r, owner: o, expires: 2026-12-31}
  - {id: museum, rules: art, when: {tenant: m}, action: flag, reason: r, owner: o, expires: 2026-05-31}
"""
)
HERE = {"tenant": "b", "route": "/atlas"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ResolvedPolicy:
    path = tmp_path_factory.mktemp("policy") / "p.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return resolve(load_policy(path, catalogue=CATALOGUE), CATALOGUE, available={"nudity", "van-gogh"}, now=NOW)


def under(
    policy: ResolvedPolicy, name: str, context: dict[str, str], *, now: datetime = NOW
) -> tuple[str, str | None] | None:
    """What a rule does for a caller, and by which exception; None where it does not apply."""
    found = {rule.id: rule for rule in policy.at(now, context).rules}
    return (found[name].effective, found[name].exception) if name in found else None


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ({}, ("refuse", None)),
        ({"tenant": "b"}, ("refuse", None)),
        ({"route": "/atlas"}, ("refuse", None)),
        ({"tenant": "b", "route": "/atlas/2"}, ("refuse", None)),
        ({"tenant": "B", "route": "/atlas"}, ("refuse", None)),
        ({"tenant": "b", "route": "/atlas"}, ("flag", "atlas")),
        ({"tenant": "b", "route": "/atlas", "user": "u"}, ("flag", "atlas")),
        ({"tenant": "a"}, ("erase", "soft")),
        ({"tenant": "a", "route": "/atlas"}, ("flag", "atlas")),  # the mildest of those that hold
    ],
)
def test_an_exception_holds_for_callers_that_match_every_key(
    policy: ResolvedPolicy, context: dict[str, str], expected: tuple[str, str | None]
) -> None:
    assert under(policy, "skin/nudity", context) == expected


def test_an_exception_is_from_the_concepts_it_names_only(policy: ResolvedPolicy) -> None:
    assert under(policy, "skin/gore", HERE) == ("refuse", None)
    assert under(policy, "skin/gore", {"tenant": "a"}) == ("refuse", "soft")  # no membrane: erasing stays refusing


@pytest.mark.parametrize(
    ("now", "holds"),
    [
        (datetime(2026, 12, 31, 0, 0, tzinfo=UTC), True),
        (datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC), True),
        (datetime(2027, 1, 1, tzinfo=UTC), False),
        (datetime(2027, 1, 1, 1, 0, tzinfo=timezone(timedelta(hours=2))), True),  # it is still 2026 in UTC
        (datetime(2026, 12, 31, 23, 0, tzinfo=timezone(timedelta(hours=-5))), False),
    ],
)
def test_an_exception_holds_to_the_end_of_its_last_day_in_utc(
    policy: ResolvedPolicy, now: datetime, holds: bool
) -> None:
    assert under(policy, "skin/nudity", HERE, now=now) == (("flag", "atlas") if holds else ("refuse", None))


def test_a_time_without_zone_is_refused(policy: ResolvedPolicy) -> None:
    with pytest.raises(UsageError, match="expected a time with its zone"):
        policy.at(datetime(2026, 6, 1), {})  # noqa: DTZ001 - that is what is tested


def test_expired_exceptions_are_told(policy: ResolvedPolicy) -> None:
    assert under(policy, "art/van-gogh", {"tenant": "m"}) == ("erase", None)
    assert [notice for notice in policy.notices if "expired" in notice] == [
        "p: 1 of 3 exceptions have expired and are ignored (museum on 2026-05-31, owner o)"
    ]


def test_the_digest_is_the_same_for_every_caller_and_time(policy: ResolvedPolicy) -> None:
    later = policy.at(NOW + timedelta(days=4000), {"tenant": "a", "task": "inpaint"})
    assert (later.digest, later.notices) == (policy.digest, policy.notices)
    assert later.at(NOW, HERE) == policy.at(NOW, HERE)  # nothing of an earlier caller is left


@pytest.mark.parametrize(
    ("task", "applies"), [(None, True), ("img2img", True), ("inpaint", True), ("txt2img", False), ("video", False)]
)
def test_a_rule_holds_for_its_tasks_and_for_runs_whose_task_is_not_known(
    policy: ResolvedPolicy, task: str | None, applies: bool
) -> None:
    view = policy.at(NOW, {"task": task} if task else {})
    assert ("idol" in {rule.id for rule in view.rules}) is applies
    assert bool(lexical_hits(view, "a photo of Pikachu")) is applies
    assert lexical_hits(view, "a photo by Banksy")
    assert any("hold for every run whose caller does not state its task" in notice for notice in policy.notices)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"task": "img2vid"}, "unknown task 'img2vid'. Did you mean 'img2img'?"),
        ({"tenant": 7}, "context['tenant']: expected text, found int"),
        ({"Tenant": "a"}, "expected names such as tenant, found 'Tenant'"),
        ({7: "a"}, "expected names such as tenant, found 7"),
    ],
)
def test_contexts_are_checked(policy: ResolvedPolicy, context: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        policy.at(NOW, context)
    assert message in str(caught.value)


def test_a_request_context_adds_to_what_is_known_and_ends_with_its_block() -> None:
    base = {"tenant": "a", "region": "eu"}
    with request_context(tenant="b", route="/x"):
        with request_context(route="/y"):
            assert current(base) == {"tenant": "b", "region": "eu", "route": "/y"}
        assert current(base)["route"] == "/x"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(current, base).result() == base  # another thread is another request
    assert current(base) == base
    with pytest.raises(UsageError), safegen.request_context(task="drawing"):
        raise AssertionError("not reached")


def test_one_place_looks_at_when_an_exception_expires() -> None:
    root = Path(safegen.__file__).parent
    asking = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if ".expires" in path.read_text("utf-8")}
    # The others say the day, compare two days, or say how far ahead it is; resolve alone decides by it.
    assert asking <= {
        "policy/resolve.py", "policy/notices.py", "policy/canonical.py", "policy/compare.py", "policy/tighten.py",
        "policy/lint.py", "cli/explain.py",
    }  # fmt: skip
    deciding = {name for name in asking if "> self.stated.expires" in (root / name).read_text("utf-8")}
    assert deciding == {"policy/resolve.py"}
