"""Where conditioning came from: negative prompts, embeddings, added tokens, reference images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import applied, draw, draw_embeds, embeds, records, rowwise, tiny_sd
from torch import Tensor

from safegen import PromptRefused
from safegen.audit import HmacKey

pytestmark = pytest.mark.usefixtures("untouched")


def test_a_negative_prompt_that_names_the_concept_opens_nothing(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, ["a fox", "the robot"], negative_prompt=["a ghost", "a ghost"])
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "santa-claus": "refuse"}):
        found = draw(pipe, ["a fox", "the robot"], negative_prompt=["a ghost", "a ghost"])
        draw(pipe, "a fox", negative_prompt="santa claus")  # nor is it refused
    assert torch.equal(found, base)
    gated = records(tmp_path, "gated")
    assert [r.action.type for r in gated if r.action] == ["allow"] * 3
    assert all(r.negative is not None for r in gated)


def test_the_concept_in_both_prompts_opens(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, "a ghost", negative_prompt="a ghost")
    with applied(pipe, tmp_path, audit_key):
        assert not torch.equal(draw(pipe, "a ghost", negative_prompt="a ghost"), base)
    assert [r.action.type for r in records(tmp_path, "gated") if r.action] == ["erase"]


def test_what_was_a_negative_prompt_once_opens_as_a_prompt(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    """The same words, and so the same embeddings, can be either; only their use in this call counts."""
    with applied(pipe, tmp_path, audit_key):
        wanted = draw(pipe, "a ghost")
        draw(pipe, "a fox", negative_prompt="a ghost")
        assert torch.equal(draw(pipe, "a ghost"), wanted)
        fox, ghost = pipe.encode_prompt("a fox", "cpu", 1, True, negative_prompt="a ghost")
        empty = pipe.encode_prompt("", "cpu", 1, False)[0]
        found = pipe(
            prompt_embeds=ghost,
            negative_prompt_embeds=empty,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        assert torch.equal(found, wanted)
        # Swapped: "a ghost" is drawn and "a fox" is pushed away.
        swapped: dict[str, Any] = dict(prompt_embeds=ghost, negative_prompt_embeds=fox, num_inference_steps=3)
        guarded = pipe(**swapped, generator=torch.Generator().manual_seed(0), output_type="pt").images
    base = pipe(**swapped, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert not torch.equal(guarded, base)


def test_without_guidance_the_only_rows_are_prompts(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, "a ghost", guidance_scale=1)
    with applied(pipe, tmp_path, audit_key):
        draw(pipe, "a fox", negative_prompt="a ghost")
        assert not torch.equal(draw(pipe, "a ghost", guidance_scale=1), base)
        ghost = pipe.encode_prompt("a fox", "cpu", 1, True, negative_prompt="a ghost")[1]
        options: dict[str, Any] = dict(num_inference_steps=3, guidance_scale=1, output_type="pt")
        found = pipe(prompt_embeds=ghost, generator=torch.Generator().manual_seed(0), **options).images
        assert not torch.equal(found, base)


def test_a_row_that_stands_alone_is_no_negative_prompt(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    """Some hosts call the denoiser once for each branch of the guidance; what is drawn alone is drawn."""
    x = torch.randn(1, 4, 8, 8)
    with applied(pipe, tmp_path, audit_key), torch.no_grad():
        ghost = pipe.encode_prompt("a fox", "cpu", 1, True, negative_prompt="a ghost")[1]
        found = pipe.unet(x, 10, encoder_hidden_states=ghost).sample
    with torch.no_grad():
        assert not torch.equal(found, pipe.unet(x, 10, encoder_hidden_states=ghost).sample)
    assert [r.action and r.action.type for r in records(tmp_path, "gated")] == ["erase"]


def test_embeddings_made_by_the_pipeline_keep_their_words(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    plain = draw_embeds(pipe, torch.cat([embeds(pipe, "a fox"), embeds(pipe, "a ghost")]), guidance_scale=1)
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "robot": "refuse"}):
        both = torch.cat([embeds(pipe, "a fox"), embeds(pipe, "a ghost")])
        found = draw_embeds(pipe, both, guidance_scale=1)
        assert rowwise(found, plain) == [True, False]
        with pytest.raises(PromptRefused):
            draw_embeds(pipe, embeds(pipe, "a robot"), guidance_scale=1)
    for record, text in zip(records(tmp_path, "gated"), ("a fox", "a ghost"), strict=True):
        assert record.prompt is not None
        assert (record.prompt.hmac, record.prompt.decoded) == (audit_key.hmac(text), None)
        assert record.inputs == ()


def test_embeddings_of_unknown_origin_open_everything(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    foreign = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    base = draw_embeds(pipe, foreign)
    with applied(pipe, tmp_path, audit_key):
        assert not torch.equal(draw_embeds(pipe, foreign), base)
        nearly = embeds(pipe, "a fox")
        nearly[0, 3, 3] += 1e-6
        draw_embeds(pipe, nearly, guidance_scale=1)
    for record in records(tmp_path, "gated"):
        assert record.prompt is None
        assert record.inputs == ("embeds_only",)
        assert [(m.permeability, m.opened) for m in record.membranes or ()] == [(1.0, True)]
        assert [m.score and (m.score.token, m.score.lexical) for m in record.membranes or ()] == [(None, None)]


@pytest.mark.parametrize(
    ("rules", "on_unknown", "reason"),
    [
        ({"ghost": "erase"}, "refuse", "on_unknown is refuse"),
        ({"ghost": "erase", "robot": "refuse"}, "open", "rule 'robot' can only refuse prompts by their words"),
        ({"ghost": "erase", "fox": "erase"}, "open", "rule 'fox' can only refuse"),  # no membrane is installed
    ],
)
def test_embeddings_of_unknown_origin_are_refused(
    rules: dict[str, str], on_unknown: str, reason: str, pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    foreign = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    with (
        applied(pipe, tmp_path, audit_key, rules, on_unknown=on_unknown),
        pytest.raises(PromptRefused, match=reason),
    ):
        draw_embeds(pipe, foreign, guidance_scale=1)
    assert [r.kind for r in records(tmp_path)][2:-2] == ["refused"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_added_tokens_have_no_known_meaning(when: str, tmp_path: Path, audit_key: HmacKey) -> None:
    own = tiny_sd()  # a text encoder cannot forget a token
    learned = own.text_encoder.get_input_embeddings().weight[own.tokenizer("ghost").input_ids[1]].detach().clone()

    def teach() -> None:
        own.tokenizer.add_tokens(["<thing>"])
        own.text_encoder.resize_token_embeddings(len(own.tokenizer))
        own.text_encoder.get_input_embeddings().weight.data[-1] = learned

    if when == "before":
        teach()
    with applied(own, tmp_path, audit_key) as guard:
        if when == "after":
            teach()
        draw(own, "a fox")
        draw(own, "a <thing>")
    assert guard.removed
    fox, thing = records(tmp_path, "gated")
    assert (fox.inputs, thing.inputs) == ((), ("embeds_only",))
    assert [m.permeability for m in thing.membranes or ()] == [1.0]


def test_a_reference_image_is_conditioning_that_no_words_tell(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    """IP-Adapter hands its image to the denoiser beside the prompt; it may come in the middle of a run."""
    x, states = torch.randn(2, 4, 8, 8), torch.cat([embeds(pipe, ""), embeds(pipe, "a fox")])
    image: dict[str, Any] = dict(added_cond_kwargs={"image_embeds": [torch.randn(2, 1, 32)]})

    @torch.no_grad()
    def predict(**options: Any) -> Tensor:
        return pipe.unet(x, 10, encoder_hidden_states=states, **options).sample

    base = predict()
    with applied(pipe, tmp_path, audit_key):
        pipe.encode_prompt("a fox", "cpu", 1, True)
        assert rowwise(predict(), base) == [True, True]
        # The unconditional row was encoded as a negative prompt; this U-Net does not look at the image itself.
        assert rowwise(predict(**image), base) == [True, False]
    assert [r.inputs for r in records(tmp_path, "gated")] == [(), ("ip_adapter", "embeds_only")]
