"""Explaining a decision, and gates at work: uncalibrated encoders, guidance, broken and chunked conditioning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    applied,
    by_hand,
    draw,
    draw_embeds,
    embeds,
    install,
    policy_file,
    random_membrane,
    records,
    rowwise,
    tiny_sentence_encoder,
)
from torch import Tensor

from safegen import PromptRefused
from safegen.audit import HmacKey
from safegen.backend import backend_of
from safegen.errors import FormatError
from safegen.explain import explain
from safegen.guard import prepare
from safegen.transport.calibration import METADATA_KEY, text_of

pytestmark = pytest.mark.usefixtures("untouched")


def test_every_score_and_every_word(pipe: Any, tmp_path: Path) -> None:
    roots = [install(tmp_path, random_membrane(pipe, floor=1.0))]
    _, _, gatekeeper = prepare(pipe, policy_file(tmp_path), membranes=roots)
    prompt = "A GH\u200bOST in the  fox " + "the " * 20
    found = explain(gatekeeper, prompt)
    (activation,) = found.decision.activations
    score = activation.score
    assert None not in (score.direction, score.clipcos, score.token, score.lexical)
    (phrase, *tokens) = activation.triggers
    assert (prompt[phrase.start : phrase.end], phrase.changes) == ("GH\u200bOST", ("format-characters", "case"))
    assert {trigger.by for trigger in tokens} <= {"evidence"}
    assert [prompt[w.start : w.end] for w in found.words[:4]] == ["A", "GH\u200bOST", "in", "the"]
    assert found.words[1].weight == 1
    assert all(0 <= word.weight <= 1 for word in found.words)
    assert found.decision.truncated == len(found.tokens) - found.read > 0
    assert len(found.evidence) == 1
    assert len(found.evidence[0]) == found.read


def test_where_nothing_opens_there_are_no_triggers(pipe: Any, tmp_path: Path) -> None:
    roots = [install(tmp_path, random_membrane(pipe, floor=1.0))]
    _, _, gatekeeper = prepare(pipe, policy_file(tmp_path), membranes=roots)
    found = explain(gatekeeper, "a fox")
    assert (found.decision.outcome, found.decision.activations[0].triggers) == ("allow", ())
    assert explain(gatekeeper, "").words == ()


# Calibrations of other encoders


def uncalibrated(pipe: Any, encoder: str | None) -> Any:
    """A membrane with the calibration of another encoder, or none."""
    entries = [replace(by_hand("direction", backend_of(pipe), -1.0), encoder=encoder)] if encoder else []
    return replace(random_membrane(pipe), metadata={METADATA_KEY: text_of(entries)} if entries else {})


@pytest.mark.parametrize("encoder", [None, "sha256:another"])
def test_without_a_calibration_for_this_encoder_words_decide(
    encoder: str | None, pipe: Any, tmp_path: Path, audit_key: HmacKey, caplog: pytest.LogCaptureFixture
) -> None:
    base = draw(pipe, ["a fox", "a gh0st"])
    policy: dict[str, Any] = dict(extra=", transport: {score: direction}")
    with applied(pipe, tmp_path, audit_key, membranes=[uncalibrated(pipe, encoder)], **policy) as guard:
        (notice,) = guard.notices
        assert "not calibrated for the score direction on this encoder" in notice
        assert "run `safegen calibrate`" in notice
        assert notice in caplog.text
        assert rowwise(draw(pipe, ["a fox", "a gh0st"]), base) == [True, False]
        draw_embeds(pipe, torch.randn(1, 16, 32), guidance_scale=1)
    found = [m for r in records(tmp_path, "gated") for m in r.membranes or ()]
    assert [m.permeability for m in found] == [0.0, 1.0, 1.0]
    assert [m.score and m.score.direction for m in found] == [None] * 3  # never compared across encoders
    assert [m.thresholds for m in found] == [()] * 3


def test_thresholds_of_the_policy_need_no_calibration(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    policy: dict[str, Any] = dict(extra=", transport: {score: direction, lo: 0.999, hi: 1.0}")
    with applied(pipe, tmp_path, audit_key, membranes=[uncalibrated(pipe, None)], **policy) as guard:
        assert guard.notices == ()
        opened = [d.activations[0].opened for d in guard.decide(["ghost", "a fox", "a ghost in the photo"])]
    assert opened == [True, False, False]  # by words nothing opens here


def test_a_calibration_that_cannot_be_read_is_refused(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    broken = replace(random_membrane(pipe), metadata={METADATA_KEY: "low"})
    with pytest.raises(FormatError, match="membrane 'ghost': safegen.calibration"):
        applied(pipe, tmp_path, audit_key, membranes=[broken])


# Scores that the policy chooses


@pytest.mark.parametrize(
    ("transport", "opened"),
    [
        ("{score: lexical}", [1.0, 0.0]),
        ("{score: always}", [1.0, 1.0]),
        ("{score: lexical, least: 0.25}", [1.0, 0.25]),
    ],
)
def test_chosen_scores(transport: str, opened: list[float], pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, ["a ghost", "a fox"])
    with applied(pipe, tmp_path, audit_key, extra=f", transport: {transport}") as guard:
        found = [d.activations[0].permeability for d in guard.decide(["a ghost", "a fox"])]
        assert rowwise(draw(pipe, ["a ghost", "a fox"]), base) == [gamma == 0 for gamma in opened]
    assert found == opened


def test_semantic_needs_its_encoder_and_uses_it(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    folder = tiny_sentence_encoder(tmp_path / "encoder")
    extra = f", sentence_encoder: {folder}, transport: {{score: semantic, lo: 0.9999, hi: 1}}"
    with applied(pipe, tmp_path, audit_key, extra=extra) as guard:
        found = guard.decide(["ghost", "the van in a photo"])
        assert [d.activations[0].permeability for d in found] == [1.0, 0.0]
        assert found[0].activations[0].score.semantic == 1.0


# Guidance


def unconditional(pipe: Any, prompts: Tensor, negatives: Tensor) -> Tensor:
    """The denoiser's prediction for the unconditional rows of guided prompts."""
    x = torch.randn(2 * len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(x, 500, encoder_hidden_states=torch.cat([negatives, prompts])).sample[: len(prompts)]


@pytest.mark.parametrize(("guidance", "kept"), [("conditional", [True, True]), ("both", [False, True])])
def test_guidance_says_which_rows_open(
    guidance: str, kept: list[bool], pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    texts = ["a ghost", "a fox"]
    base = unconditional(pipe, *pipe.encode_prompt(texts, "cpu", 1, True, negative_prompt=["a van", "the van"]))
    with applied(pipe, tmp_path, audit_key, extra=f", transport: {{guidance: {guidance}}}"):
        states = pipe.encode_prompt(texts, "cpu", 1, True, negative_prompt=["a van", "the van"])
        assert rowwise(unconditional(pipe, *states), base) == kept
    assert [r.action and r.action.type for r in records(tmp_path, "gated")] == ["erase", "allow"]


def test_both_rows_open_where_the_pairing_is_not_known(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    x = torch.randn(3, 4, 8, 8)
    with applied(pipe, tmp_path, audit_key, extra=", transport: {guidance: both}"), torch.no_grad():
        prompts, negatives = pipe.encode_prompt(["a fox", "a ghost"], "cpu", 1, True)
        rows = torch.cat([negatives[:1], prompts])
        found = pipe.unet(x, 500, encoder_hidden_states=rows).sample
    base = pipe.unet(x, 500, encoder_hidden_states=rows).sample
    assert rowwise(found, base) == [False, True, False]


# Conditioning


def test_conditioning_that_is_no_number_is_refused(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    broken = embeds(pipe, "a fox")
    broken[0, 3, 3] = float("nan")
    with applied(pipe, tmp_path, audit_key), pytest.raises(PromptRefused, match="NaN or infinity"):
        draw_embeds(pipe, broken, guidance_scale=1)
    assert [r.kind for r in records(tmp_path)][2:-2] == ["refused"]


def test_a_broken_negative_prompt_is_refused_too(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    states = torch.cat([torch.full((1, 16, 32), torch.inf), embeds(pipe, "a fox")])
    with applied(pipe, tmp_path, audit_key), pytest.raises(PromptRefused, match="NaN or infinity"):
        pipe.unet(torch.randn(2, 4, 8, 8), 10, encoder_hidden_states=states)


@pytest.mark.parametrize(("last", "kept"), [("a ghost", False), ("a van", True)])
def test_a_long_prompt_is_read_chunk_by_chunk(
    last: str, kept: bool, pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    x = torch.randn(1, 4, 8, 8)

    @torch.no_grad()
    def predict() -> Tensor:
        states = torch.cat([embeds(pipe, "a fox in the photo"), embeds(pipe, last)], dim=1)
        return pipe.unet(x, 500, encoder_hidden_states=states).sample

    base = predict()
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "robot": "refuse"}):  # words must be known
        assert torch.equal(predict(), base) == kept
    (gated,) = records(tmp_path, "gated")
    assert gated.prompt is not None
    assert gated.prompt.hmac == audit_key.hmac(f"a fox in the photo {last}")
    assert gated.prompt.decoded is True


def test_a_long_prompt_with_one_foreign_chunk_is_unknown(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key), torch.no_grad():
        states = torch.cat([embeds(pipe, "a fox"), torch.randn(1, 16, 32)], dim=1)
        pipe.unet(torch.randn(1, 4, 8, 8), 500, encoder_hidden_states=states)
    (gated,) = records(tmp_path, "gated")
    assert gated.inputs == ("embeds_only",)
    assert [m.permeability for m in gated.membranes or ()] == [1.0]


def test_a_prompt_and_its_own_embeddings_open_alike(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    texts = ["a fox", "the gho-st", "GH\u00d6ST", "van photo", "in the style of the ghost"]
    membrane = random_membrane(pipe, floor=-0.5)
    with applied(pipe, tmp_path, audit_key, membranes=[membrane]) as guard:
        decided = [d.activations[0].permeability for d in guard.decide(texts)]
        for text in texts:
            draw(pipe, text, guidance_scale=1)
            draw_embeds(pipe, embeds(pipe, text), guidance_scale=1)
            with torch.no_grad():  # by hand, so that the caller's own text is not seen
                draw_embeds(pipe, pipe.text_encoder(backend_of(pipe).tokenise([text]))[0], guidance_scale=1)
    found = [m.permeability or 0.0 for r in records(tmp_path, "gated") for m in r.membranes or ()]
    assert found == pytest.approx([gamma for gamma in decided for _ in range(3)], abs=2e-6)
    assert len({round(gamma, 3) for gamma in decided}) > 2


# What the log says


def test_evidence_is_recorded_where_the_policy_asks(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    text = "fox and the ghost in a photo"
    for name in ("none", "opened"):
        (tmp_path / name).mkdir()
        with applied(pipe, tmp_path / name, audit_key, audit=f"{{evidence: {name}}}"):
            image = draw(pipe, [text, "a fox"])
            assert torch.equal(image, draw(pipe, [text, "a fox"]))
        opened, shut, *_ = records(tmp_path / name, "gated")
        (membrane,) = list(opened.membranes or ())
        kinds = [trigger.by for trigger in membrane.triggers or ()]
        assert kinds[0] == "lexical"
        assert ("evidence" in kinds) == (name == "opened")
        assert [m.triggers for m in shut.membranes or ()] == [()]
        assert len(records(tmp_path / name, "gated")) == 4  # looking for evidence is no new encoding of the host's


def test_what_the_model_does_not_read_is_counted(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key):
        draw(pipe, ["a fox", "fox " * 20])
    assert [r.truncated_tokens for r in records(tmp_path, "gated")] == [0, 6]
