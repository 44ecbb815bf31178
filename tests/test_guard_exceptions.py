"""Exceptions and tasks at run time: per caller, per request, by one clock, recorded, and the same from everywhere."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import draw, draw_embeds, embeds, install, policy_file, random_membrane, records, rowwise
from typer.testing import CliRunner

from safegen import Guard, PromptRefused, apply_policy, request_context
from safegen.audit import HmacKey
from safegen.cli.app import app
from safegen.errors import UsageError
from safegen.explain import explain
from safegen.guard import prepare

pytestmark = pytest.mark.usefixtures("untouched")

TODAY = datetime.now(UTC).date()
ATLAS = {"tenant": "atlas"}
RULES = {"ghost": "erase", "robot": "refuse", "fox": "refuse, applies_to: [img2img]"}


def excepting(
    folder: Path,
    expires: date = TODAY + timedelta(days=30),
    *,
    rules: str = "[ghost, robot]",
    action: str = "flag",
    mode: str = "enforce",
) -> Path:
    """Writes a policy with one exception for the tenant `atlas`."""
    path = policy_file(folder, RULES, mode=mode)
    text = (
        f"exceptions:\n  - {{id: plates, rules: {rules}, when: {{tenant: atlas}}, action: {action}, "
        f"reason: SEC-1, owner: me, expires: {expires.isoformat()}}}\n"
    )
    path.write_text(path.read_text("utf-8") + text, encoding="utf-8")
    return path


@pytest.fixture
def roots(pipe: Any, tmp_path: Path) -> list[Path]:
    return [install(tmp_path, random_membrane(pipe, floor=1.0))]


def put_in_force(pipe: Any, folder: Path, key: HmacKey, policy: Path, roots: list[Path], **options: Any) -> Guard:
    return apply_policy(pipe, policy, audit=folder / "audit", audit_key=key, membranes=roots, **options)


def test_a_caller_with_an_exception_gets_the_base_image_and_a_record_of_what_was_found(
    pipe: Any, tmp_path: Path, audit_key: HmacKey, roots: list[Path]
) -> None:
    base = draw(pipe, ["a ghost", "a robot", "a mouse"])
    with put_in_force(pipe, tmp_path, audit_key, excepting(tmp_path), roots, context=ATLAS):
        assert torch.equal(draw(pipe, ["a ghost", "a robot", "a mouse"]), base)
    gated = records(tmp_path, "gated")
    assert [(r.verdict.decision, r.verdict.rule) for r in gated if r.verdict] == [
        ("match", "ghost"), ("match", "robot"), ("clear", None),
    ]  # fmt: skip
    assert [(r.action.type, r.action.enforced) for r in gated if r.action] == [
        ("flag", True), ("flag", True), ("allow", True),
    ]  # fmt: skip
    assert [[(e.id, e.rule, e.action) for e in r.exceptions or ()] for r in gated] == [
        [("plates", "ghost", "flag")],
        [("plates", "robot", "flag")],
        [],
    ]
    assert [m.opened for r in gated for m in r.membranes or ()] == [False] * 3


def test_the_context_of_a_request_is_that_of_its_thread(
    pipe: Any, tmp_path: Path, audit_key: HmacKey, roots: list[Path]
) -> None:
    base = draw(pipe, "a ghost")
    with put_in_force(pipe, tmp_path, audit_key, excepting(tmp_path), roots) as guard:
        with request_context(**ATLAS):
            assert torch.equal(draw(pipe, "a ghost"), base)
            assert [d.outcome for d in guard.decide(["a ghost", "a robot"])] == ["flag", "flag"]
            with ThreadPoolExecutor(1) as pool:
                assert [d.outcome for d in pool.submit(guard.decide, ["a ghost"]).result()] == ["erase"]
        with request_context(tenant="other"), pytest.raises(PromptRefused):
            draw(pipe, "a robot")
        assert not torch.equal(draw(pipe, "a ghost"), base)
        assert len({r.policy.digest for r in records(tmp_path) if r.policy}) == 1


def test_an_exception_may_erase_what_is_refused(
    pipe: Any, tmp_path: Path, audit_key: HmacKey, roots: list[Path]
) -> None:
    path = policy_file(tmp_path, {"ghost": "refuse"})
    own = "exceptions: [{id: x, rules: ghost, when: {tenant: atlas}, action: erase, reason: r, owner: o, expires: "
    path.write_text(f"{path.read_text('utf-8')}{own}{TODAY + timedelta(days=1)}}}]\n", encoding="utf-8")
    base = draw(pipe, "a ghost")
    with put_in_force(pipe, tmp_path, audit_key, path, roots):
        with pytest.raises(PromptRefused, match="'ghost'"):
            draw(pipe, "a ghost")
        with request_context(**ATLAS):
            assert not torch.equal(draw(pipe, "a ghost"), base)
    (gated,) = records(tmp_path, "gated")
    assert gated.action is not None
    assert (gated.action.type, [m.permeability for m in gated.membranes or ()]) == ("erase", [1.0])
    assert [(e.id, e.action) for e in gated.exceptions or ()] == [("x", "erase")]


def test_a_rule_that_refuses_erases_what_only_the_score_sees(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    roots = [install(tmp_path, random_membrane(pipe, floor=-1.0))]  # the score of every prompt opens it
    prompts = ["a fox", "a ghost"]
    base = draw(pipe, prompts[0])
    with put_in_force(pipe, tmp_path, audit_key, policy_file(tmp_path, {"ghost": "refuse"}), roots) as guard:
        near, named = guard.decide(prompts)
        assert (near.outcome, named.outcome) == ("erase", "refuse")
        assert not torch.equal(draw(pipe, prompts[0]), base)
        with pytest.raises(PromptRefused):
            draw(pipe, prompts[1])


def test_a_rule_of_another_task_is_left_out_where_the_task_is_stated(
    pipe: Any, tmp_path: Path, audit_key: HmacKey, roots: list[Path]
) -> None:
    with put_in_force(pipe, tmp_path, audit_key, excepting(tmp_path), roots) as guard:
        for task, outcome in ((None, "refuse"), ("img2img", "refuse"), ("txt2img", "allow")):
            with request_context(**{"task": task} if task else {}):
                assert guard.decide(["a fox"])[0].outcome == outcome, task
    assert any("does not state its task" in notice for notice in guard.notices)
    with pytest.raises(UsageError, match="unknown task 'img2vid'"):
        put_in_force(pipe, tmp_path, audit_key, excepting(tmp_path), roots, context={"task": "img2vid"})


def test_conditioning_of_unknown_origin_follows_the_exceptions_too(
    pipe: Any, tmp_path: Path, audit_key: HmacKey, roots: list[Path]
) -> None:
    foreign = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(3))
    base = draw_embeds(pipe, foreign)
    path = policy_file(tmp_path, {"ghost": "erase"})
    own = "exceptions: [{id: x, rules: ghost, when: {tenant: atlas}, action: flag, reason: r, owner: o, expires: "
    path.write_text(f"{path.read_text('utf-8')}{own}{TODAY + timedelta(days=1)}}}]\n", encoding="utf-8")
    with put_in_force(pipe, tmp_path, audit_key, path, roots):
        assert not torch.equal(draw_embeds(pipe, foreign), base)
        with request_context(**ATLAS):
            assert torch.equal(draw_embeds(pipe, foreign), base)
    flagged = records(tmp_path, "gated")[-1]
    assert flagged.verdict is not None
    assert flagged.action is not None
    assert (flagged.verdict.decision, flagged.action.type) == ("match", "flag")
    assert [e.id for e in flagged.exceptions or ()] == ["x"]


def test_an_exception_ends_under_a_guard_that_runs_on(
    pipe: Any, tmp_path: Path, audit_key: HmacKey, roots: list[Path]
) -> None:
    now = [datetime(2027, 3, 31, 23, 59, tzinfo=UTC)]
    path = excepting(tmp_path, date(2027, 3, 31))
    with put_in_force(pipe, tmp_path, audit_key, path, roots, context=ATLAS, clock=lambda: now[0]) as guard:
        assert guard.decide(["a robot"])[0].outcome == "flag"
        draw(pipe, "a robot")
        now[0] += timedelta(minutes=1)
        assert guard.decide(["a robot"])[0].outcome == "refuse"
        with pytest.raises(PromptRefused):
            draw(pipe, "a robot")


@pytest.mark.parametrize(("days", "outcome"), [(-1, "refuse"), (1, "flag")])
def test_runtime_audit_explain_and_test_agree_on_what_has_expired(
    pipe: Any, tmp_path: Path, audit_key: HmacKey, roots: list[Path], days: int, outcome: str
) -> None:
    """The clock is the system's here, as it is for users."""
    pipe.save_pretrained(tmp_path / "pipeline")
    path = excepting(tmp_path, datetime.now(UTC).date() + timedelta(days=days))
    with put_in_force(pipe, tmp_path, audit_key, path, roots, context=ATLAS) as guard:
        assert guard.decide(["a robot"])[0].outcome == outcome
        if outcome == "refuse":
            with pytest.raises(PromptRefused):
                draw(pipe, "a robot")
        else:
            draw(pipe, "a robot")
    (drawn,) = records(tmp_path, "refused" if outcome == "refuse" else "gated")
    assert drawn.action is not None
    assert drawn.action.type == outcome
    assert any("have expired" in notice for notice in guard.notices) is (days < 0)

    _, _, gatekeeper = prepare(pipe, path, membranes=roots, context=ATLAS)
    assert explain(gatekeeper, "a robot").decision.outcome == outcome

    (tmp_path / "prompts.txt").write_text("a robot\n", encoding="utf-8")
    host = ["--model", tmp_path / "pipeline", "--policy", path, "--membranes", roots[0], "--context", "tenant=atlas"]
    commands = {"audit": ["--prompts", tmp_path / "prompts.txt"], "explain": ["--prompt", "a robot"]}
    for command, options in commands.items():
        done = CliRunner().invoke(app, [command, *map(str, (*options, *host)), "--json"])
        found = json.loads(done.stdout)
        decision = found["prompts"][0] if command == "audit" else found
        assert decision["outcome"] == outcome, command
        assert [e["exception"] for e in decision["exceptions"]] == ([] if days < 0 else ["plates"]), command
        assert any("have expired" in notice for notice in found["notices"]) is (days < 0)

    (tmp_path / "excepting.policytest.yaml").write_text(
        f"""
apiVersion: safegen.dev/v1
kind: PolicyTest
policy: {path.name}
cases:
  - {{name: a robot, prompt: a robot, context: {{tenant: atlas}}, expect: {{robot: {outcome}}}}}
""",
        encoding="utf-8",
    )
    done = CliRunner().invoke(app, ["test", str(tmp_path / "excepting.policytest.yaml"), "--fail-under", "0"])
    assert "1 cases, 1 passed" in done.output


def test_observing_a_policy_with_everything_in_it_changes_no_pixel(
    pipe: Any, tmp_path: Path, audit_key: HmacKey, roots: list[Path]
) -> None:
    prompts = ["a ghost", "a robot", "a fox", "a mouse"]
    base, prompted = draw(pipe, prompts), draw_embeds(pipe, embeds(pipe, "a ghost"))
    with put_in_force(pipe, tmp_path, audit_key, excepting(tmp_path, mode="observe"), roots):
        assert rowwise(draw(pipe, prompts), base) == [True] * 4
        assert torch.equal(draw_embeds(pipe, embeds(pipe, "a ghost")), prompted)
        with request_context(**ATLAS):
            assert rowwise(draw(pipe, prompts), base) == [True] * 4
    gated = records(tmp_path, "gated")
    assert all(r.action and (r.action.type, r.action.enforced) == ("allow", False) for r in gated)
    would = [r.action.would for r in gated if r.action]
    assert would[:4] == ["erase", "refuse", "refuse", "allow"]
    assert would[-4:] == ["flag", "flag", "refuse", "allow"]
    assert [r.verdict.decision for r in gated if r.verdict][-4:] == ["match", "match", "match", "clear"]
