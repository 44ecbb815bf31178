"""Modes, policies without membranes, and what a guard tells."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    applied,
    attributes,
    draw,
    draw_embeds,
    install,
    policy_file,
    random_membrane,
    records,
    same_state,
    state_of,
)

from safegen import Guard, PromptRefused, apply_policy
from safegen.audit import HmacKey

pytestmark = pytest.mark.usefixtures("untouched")


def test_observe_changes_no_image_and_records_what_would_be_done(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    prompts = ["a ghost", "a robot", "a fox", "santa claus"]
    base = draw(pipe, prompts)
    rules = {"ghost": "erase", "robot": "refuse", "santa-claus": "flag"}
    with applied(pipe, tmp_path, audit_key, rules, mode="observe") as guard:
        assert torch.equal(draw(pipe, prompts), base)
        draw_embeds(pipe, torch.randn(1, 16, 32), guidance_scale=1)
    assert any("observe" in notice for notice in guard.notices)
    gated = records(tmp_path, "gated")
    actions = [(r.action.type, r.action.enforced, r.action.would) for r in gated if r.action]
    assert actions == [("allow", False, would) for would in ("erase", "refuse", "allow", "flag", "refuse")]
    assert not any(m.opened for r in gated for m in r.membranes or ())
    assert [m.permeability for m in gated[0].membranes or ()] == [1.0]  # what it would have been opened to
    assert len(records(tmp_path, "generated")) == 5
    assert all(m.effect is None for r in records(tmp_path, "generated") for m in r.membranes or ())


def test_disabled_attaches_nothing(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    before, kept, base = state_of(*parts), attributes(pipe), draw(pipe, ["a ghost", "a robot"])
    rules = {"ghost": "erase", "robot": "refuse"}
    with applied(pipe, tmp_path, audit_key, rules, mode="disabled") as guard:
        assert same_state(before, state_of(*parts))
        assert attributes(pipe) == kept
        assert torch.equal(draw(pipe, ["a ghost", "a robot"]), base)
    assert any("disabled" in notice for notice in guard.notices)
    assert [r.kind for r in records(tmp_path)] == [
        "segment.open",
        "policy.applied",
        "policy.removed",
        "segment.close",
    ]
    attest = records(tmp_path, "policy.applied")[0].attest
    assert attest is not None
    assert (attest.modules_expected, attest.modules_seen) == (48, 0)


def test_a_flag_is_recorded_and_changes_nothing(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, "a robot")
    with applied(pipe, tmp_path, audit_key, {"robot": "flag"}, membranes=[]):
        assert torch.equal(draw(pipe, "a robot"), base)
    (gated,) = records(tmp_path, "gated")
    assert gated.action is not None
    assert (gated.action.type, gated.action.enforced) == ("flag", True)
    assert [hit.rule for hit in gated.hits or ()] == ["robot"]


def test_the_strict_policy_on_a_model_without_membranes(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    prompts = ["a fox", "a photo of the robot"]
    base = draw(pipe, prompts)
    with apply_policy(pipe, "strict", audit=tmp_path / "audit", audit_key=audit_key) as guard:
        assert guard.notices
        assert "have no membrane" in guard.notices[0]
        assert torch.equal(draw(pipe, prompts), base)
        for refused in ("in the style of van gogh", "mickey mouse", "a nude", "v\u200ban g0gh"):
            with pytest.raises(PromptRefused, match="for which no membrane is installed"):
                draw(pipe, refused)
        with pytest.raises(PromptRefused):
            draw(pipe, ["a fox", "mickey mouse"])
    assert len(records(tmp_path, "refused")) == 6


def test_decide_says_what_a_run_does(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    prompts = ["a ghost", "a fox", "a robot", "ghost and robot"]
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "robot": "refuse"}) as guard:
        decisions = guard.decide(prompts)
        assert [d.outcome for d in decisions] == ["erase", "allow", "refuse", "refuse"]
        assert [d.text for d in decisions] == prompts
        assert [[h.concept for h in d.hits] for d in decisions] == [["ghost"], [], ["robot"], ["ghost", "robot"]]
        assert [a.permeability for d in decisions for a in d.activations] == [1.0, 0.0, 0.0, 1.0]
        assert decisions[0].rule is not None
        assert decisions[0].rule.id == "ghost"
        assert "ghost" in decisions[0].reason
        assert guard.decide([]) == []
        draw(pipe, prompts[:2])
    assert [r.kind for r in records(tmp_path)][2:-2] == ["gated"] * 2 + ["generated"] * 2  # deciding records nothing


def test_the_audit_folder_is_that_of_the_environment(
    pipe: Any, tmp_path: Path, audit_key: HmacKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, wanted in ((str(tmp_path / "own"), tmp_path / "own"), ("", tmp_path / "state" / "safegen" / "audit")):
        monkeypatch.setenv("SAFEGEN_AUDIT_DIR", value)
        policy = policy_file(tmp_path)
        with apply_policy(pipe, policy, audit_key=audit_key, membranes=[install(tmp_path, random_membrane(pipe))]) as g:
            assert isinstance(g, Guard)
            assert g.audit_path.is_relative_to(wanted)


def test_a_shallow_copy_of_the_pipeline_is_guarded(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, "a ghost")
    with applied(pipe, tmp_path, audit_key):
        assert not torch.equal(draw(copy.copy(pipe), "a ghost"), base)
