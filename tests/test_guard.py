"""`apply_policy` on tiny real pipelines: what it changes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from tiny import applied, draw, install, policy_file, random_membrane, records, same_state, state_of, tiny_sd
from torch import Tensor

from safegen import Guard, PromptRefused, apply_policy
from safegen.audit import HmacKey
from safegen.errors import (
    AlreadyAppliedError,
    BaseModelMismatchError,
    FormatError,
    MembraneNotFoundError,
    UnsupportedBackendError,
)
from safegen.membrane.weights import Factor


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One pipeline for all tests: each must leave it as it was, which `_untouched` checks."""
    return tiny_sd()


@pytest.fixture(autouse=True)
def _untouched(pipe: Any) -> Any:
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    before, attributes = state_of(*parts), own(pipe)
    yield
    assert same_state(before, state_of(*parts)), "the test left something behind on the pipeline"
    assert own(pipe) == attributes


def own(pipe: Any) -> dict[str, int]:
    """A pipeline's attributes by identity, without those that diffusers sets in each run."""
    run = {
        "_clip_skip",
        "_cross_attention_kwargs",
        "_guidance_rescale",
        "_guidance_scale",
        "_interrupt",
        "_num_timesteps",
    }
    return {key: id(value) for key, value in pipe.__dict__.items() if key not in run}


def rowwise(first: Tensor, second: Tensor) -> list[bool]:
    """For each image, whether the two are equal bit for bit."""
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


# What it leaves alone


def test_removing_undoes_applying(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    before, keys, base = state_of(*parts), list(pipe.unet.state_dict()), draw(pipe, "a ghost")
    with applied(pipe, tmp_path, audit_key) as guard:
        assert list(pipe.unet.state_dict()) == keys
        assert repr(pipe.unet) == before["0: repr"]
        assert not same_state(before, state_of(*parts))  # else the comparison would prove nothing
        assert not torch.equal(draw(pipe, "a ghost"), base)
        assert not guard.removed
    assert guard.removed
    assert same_state(before, state_of(*parts))
    assert torch.equal(draw(pipe, "a ghost"), base)
    guard.remove()  # the second time does nothing


def test_it_can_be_applied_again(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    images: list[Tensor] = []
    for _ in range(2):
        with applied(pipe, tmp_path, audit_key):
            images.append(draw(pipe, "a ghost"))
    assert torch.equal(*images)


def test_an_exception_in_the_middle_of_a_run_leaves_nothing(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, ["a ghost", "a fox"])

    def fail(_pipe: Any, step: int, _t: Any, _values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise RuntimeError("stop")
        return {}

    with applied(pipe, tmp_path, audit_key):
        erased = draw(pipe, ["a ghost", "a fox"])
        with pytest.raises(RuntimeError, match="stop"):
            draw(pipe, "a ghost", callback_on_step_end=fail)
        assert rowwise(draw(pipe, ["a ghost", "a fox"]), erased) == [True, True]
    assert torch.equal(draw(pipe, ["a ghost", "a fox"]), base)


def test_a_refusal_leaves_nothing(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, "a fox")
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "robot": "refuse"}):
        for _ in range(2):
            with pytest.raises(PromptRefused, match="'robot'.*nothing was drawn") as caught:
                draw(pipe, ["a fox", "a robot"])
            assert torch.equal(draw(pipe, "a fox"), base)
    assert caught.value.decision["rule"] == "robot"
    assert caught.value.decision["concept"] == "robot"
    assert torch.equal(draw(pipe, "a fox"), base)


def test_rows_that_no_rule_touches_keep_every_bit_in_a_mixed_batch(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    prompts = ["a fox", "a ghost", "the robot", "ghost in a photo"]
    base = draw(pipe, prompts)
    with applied(pipe, tmp_path, audit_key):
        assert rowwise(draw(pipe, prompts), base) == [True, False, True, False]
        assert rowwise(draw(pipe, ["a fox", "the robot"]), draw(pipe, ["a fox", "the robot"])) == [True, True]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_shut_is_the_base_model_bit_for_bit(guidance: float, pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    options: dict[str, Any] = dict(guidance_scale=guidance, num_images_per_prompt=2, seed=5)
    base, ghosts = (draw(pipe, prompts, **options) for prompts in (["a fox", ""], ["a fox", "a ghost"]))
    with applied(pipe, tmp_path, audit_key):
        assert rowwise(draw(pipe, ["a fox", ""], **options), base) == [True] * 4
        assert rowwise(draw(pipe, ["a fox", "a ghost"], **options), ghosts) == [True, True, False, False]
    generated = records(tmp_path, "generated")
    assert [r.output.n for r in generated if r.output] == [2, 2, 2, 2]


def test_a_permeability_between_0_and_1_is_applied_as_it_is(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    """The tiny encoder's cosine with "ghost" is below 1 and above this floor."""
    base = draw(pipe, "a fox", guidance_scale=1)
    membrane = random_membrane(pipe, floor=0.1, size=0.1)
    with applied(pipe, tmp_path, audit_key, membranes=[membrane]) as guard:
        (activation,) = guard.decide(["a fox"])[0].activations
        assert 0.1 < activation.permeability < 1
        found = draw(pipe, "a fox", guidance_scale=1)
    # The same size by another road: fully open, with factors scaled down.
    scaled = {k: Factor(f.down, f.up, f.alpha * activation.permeability) for k, f in membrane.factors.items()}
    other = random_membrane(pipe, floor=0.1)
    pinned = type(other)("ghost", ("a fox",), other.base, other.architecture, scaled, floor=0.1)
    (tmp_path / "again").mkdir()
    with applied(pipe, tmp_path / "again", audit_key, membranes=[pinned]):
        torch.testing.assert_close(found, draw(pipe, "a fox", guidance_scale=1), atol=1e-5, rtol=1e-4)
    assert (found - base).abs().max() > 1e-3


def test_strength_multiplies(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    weak = random_membrane(pipe, floor=1.0, size=0.1)
    double = type(weak)(
        "ghost",
        weak.targets,
        weak.base,
        weak.architecture,
        {k: Factor(f.down, f.up, 2 * f.alpha) for k, f in weak.factors.items()},
    )
    images: list[Tensor] = []
    for name, rule, membrane in (("a", "erase, strength: 2.0", weak), ("b", "erase", double), ("c", "erase", weak)):
        (tmp_path / name).mkdir()
        with applied(pipe, tmp_path / name, audit_key, {"ghost": rule}, membranes=[membrane]):
            images.append(draw(pipe, "a ghost"))
    torch.testing.assert_close(images[0], images[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(images[0], images[2], atol=1e-4)


def test_two_membranes_open_apart(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    both = [random_membrane(pipe, "ghost", floor=1.0), random_membrane(pipe, "fox", floor=1.0, seed=1, rank=2)]
    prompts = ["a ghost", "a fox", "a ghost in a fox", "a robot"]
    base = draw(pipe, prompts)
    single: dict[str, Tensor] = {}
    for membrane in both:
        (tmp_path / membrane.concept).mkdir()
        rules = {membrane.concept: "erase"}
        with applied(pipe, tmp_path / membrane.concept, audit_key, rules, membranes=[membrane]):
            single[membrane.concept] = draw(pipe, prompts)
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "fox": "erase"}, membranes=both):
        found = draw(pipe, prompts)
    torch.testing.assert_close(found[0], single["ghost"][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], single["fox"][1], atol=1e-5, rtol=1e-4)
    for other in (base, single["ghost"], single["fox"]):
        assert not torch.allclose(found[2], other[2], atol=1e-3)
    assert torch.equal(found[3], base[3])


# Negative prompts


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


# Embeddings


def embeds(pipe: Any, text: str) -> Tensor:
    return pipe.encode_prompt(text, "cpu", 1, False)[0]


def draw_embeds(pipe: Any, prompt: Tensor, **options: Any) -> Tensor:
    negative = torch.zeros_like(prompt) if options.get("guidance_scale", 2) > 1 else None
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompt))]
    values: dict[str, Any] = dict(num_inference_steps=3, output_type="pt", generator=generators) | options
    return pipe(prompt_embeds=prompt, negative_prompt_embeds=negative, **values).images


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
    assert [r.inputs for r in records(tmp_path, "gated")] == [(), ("embeds_only",)]


# The conditioning changes during a run


def swap(new: Tensor, at: int) -> Any:
    def callback(_pipe: Any, step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            values["prompt_embeds"] = torch.cat([values["prompt_embeds"][:1], new])
        return values

    return dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_conditioning_swapped_in_a_callback_is_gated_and_recorded_again(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    base = draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "a ghost"), 1))
    with applied(pipe, tmp_path, audit_key):
        found = draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "a ghost"), 1))
        kept = draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "the robot"), 1))
    assert not torch.equal(found, base)
    assert torch.equal(kept, draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "the robot"), 1)))
    gated = [(r.prompt and r.prompt.hmac, r.action and r.action.type) for r in records(tmp_path, "gated")]
    fox, ghost, robot = (audit_key.hmac(text) for text in ("a fox", "a ghost", "the robot"))
    assert gated == [(fox, "allow"), (ghost, "erase"), (fox, "allow"), (robot, "allow")]
    ids = [r.request and r.request.id for r in records(tmp_path, "gated")]
    assert (ids[0] == ids[1], ids[2] == ids[3], ids[0] == ids[2]) == (True, True, False)
    erased, _ = records(tmp_path, "generated")
    assert [m.effect is not None and m.effect > 0 for m in erased.membranes or ()] == [True]


def test_conditioning_swapped_for_what_is_refused_stops_the_run(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key, {"robot": "refuse"}, membranes=[]), pytest.raises(PromptRefused):
        draw(pipe, "a fox", steps=4, **swap(embeds(pipe, "a robot"), 1))
    assert [r.kind for r in records(tmp_path)][2:-2] == ["gated", "refused"]


@pytest.mark.parametrize("inference", [False, True])
def test_conditioning_written_in_place_is_gated_again(
    inference: bool, pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    new = embeds(pipe, "a ghost")

    def callback(_pipe: Any, step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            values["prompt_embeds"][1:] = new
        return {}

    options: dict[str, Any] = dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with applied(pipe, tmp_path, audit_key), torch.inference_mode(inference):
        new = embeds(pipe, "a ghost")
        draw(pipe, "a fox", steps=4, **options)
    assert [r.action and r.action.type for r in records(tmp_path, "gated")] == ["allow", "erase"]


def test_conditioning_that_is_copied_at_every_step_is_recorded_once(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    def callback(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": values["prompt_embeds"].clone()}

    with applied(pipe, tmp_path, audit_key):
        draw(
            pipe, "a fox", steps=4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        )
    assert len(records(tmp_path, "gated")) == 1


def test_asking_for_a_decision_in_the_middle_of_a_run_changes_nothing(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    with applied(pipe, tmp_path, audit_key) as guard:
        wanted = draw(pipe, "a fox", negative_prompt="a ghost")

        def callback(_pipe: Any, _step: int, _t: Any, _values: dict[str, Any]) -> dict[str, Any]:
            assert guard.decide(["a ghost"])[0].outcome == "erase"
            return {}

        assert torch.equal(draw(pipe, "a fox", negative_prompt="a ghost", callback_on_step_end=callback), wanted)
    assert len(records(tmp_path, "gated")) == 2


def test_inference_mode(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, ["a ghost", "a fox"])
    with applied(pipe, tmp_path, audit_key), torch.inference_mode():
        assert rowwise(draw(pipe, ["a ghost", "a fox"]), base) == [False, True]


@pytest.mark.parametrize("abort", [False, True])
def test_every_run_is_recorded_however_the_one_before_ended(
    abort: bool, pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    """One-step runs without decoding, and runs after one that was stopped at its first step, start where it was."""

    def stop(_pipe: Any, _step: int, _t: Any, _values: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with applied(pipe, tmp_path, audit_key):
        for _ in range(3):
            options: dict[str, Any] = dict(num_inference_steps=3 if abort else 1, output_type="latent")
            if abort:
                with pytest.raises(KeyboardInterrupt):
                    pipe("a fox", callback_on_step_end=stop, **options)
            else:
                pipe("a fox", **options)
    gated = records(tmp_path, "gated")
    assert len({r.request.id for r in gated if r.request}) == len(gated) == 3


# Other pipelines on the same parts


def sibling(pipe: Any, kind: type[Any] = StableDiffusionPipeline) -> Any:
    found = kind.from_pipe(pipe)
    found.set_progress_bar_config(disable=True)
    return found


def test_a_pipeline_made_with_from_pipe_is_guarded(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    base = draw(pipe, ["a ghost", "a fox"])
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "robot": "refuse"}):
        wanted = draw(pipe, ["a ghost", "a fox"])
        other = sibling(pipe)
        assert rowwise(draw(other, ["a ghost", "a fox"]), wanted) == [True, True]
        with pytest.raises(PromptRefused):
            draw(other, "a r0bot")
    assert rowwise(wanted, base) == [False, True]
    assert len(records(tmp_path, "generated")) == 4
    assert torch.equal(draw(other, ["a ghost", "a fox"]), base)


def test_an_img2img_pipeline_made_with_from_pipe_is_guarded(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def redraw(prompt: str) -> Tensor:
        values: dict[str, Any] = dict(image=image, strength=0.8, num_inference_steps=5, output_type="pt")
        return other(prompt, generator=torch.Generator().manual_seed(1), **values).images

    other = sibling(pipe, StableDiffusionImg2ImgPipeline)
    base = [redraw("a ghost"), redraw("a fox")]
    with applied(pipe, tmp_path, audit_key, {"ghost": "erase", "robot": "refuse"}):
        found = [redraw("a ghost"), redraw("a fox")]
        with pytest.raises(PromptRefused):
            redraw("a robot")
    assert not torch.equal(found[0], base[0])
    assert torch.equal(found[1], base[1])
    assert len(records(tmp_path, "generated")) == 2


def test_a_pipeline_from_from_pipe_never_borrows_another_calls_negative_prompt(
    pipe: Any, tmp_path: Path, audit_key: HmacKey
) -> None:
    base = draw(pipe, ["a ghost", "a fox"], guidance_scale=1)
    with applied(pipe, tmp_path, audit_key):
        other = sibling(pipe)
        pipe.encode_prompt("a fox", "cpu", 1, True, negative_prompt="a ghost")
        assert rowwise(draw(other, ["a ghost", "a fox"], guidance_scale=1), base) == [False, True]


# Applying that is refused


def test_a_second_guard_is_refused_without_mutation(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key):
        parts = (pipe.unet, pipe.text_encoder, pipe.vae)
        held, attributes = state_of(*parts), own(pipe)
        erased = draw(pipe, "a ghost")
        for target in (pipe, sibling(pipe)):
            with pytest.raises(AlreadyAppliedError, match="already carries a policy"):
                applied(target, tmp_path, audit_key)
        assert same_state(held, state_of(*parts))
        assert own(pipe) == attributes
        assert torch.equal(draw(pipe, "a ghost"), erased)


def test_a_membrane_of_another_base_is_refused_without_mutation(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    from dataclasses import replace

    from safegen.backend import backend_of

    family = backend_of(pipe).family
    wrong = replace(random_membrane(tiny_sd(blocks=(16, 48))), base=family)
    before = state_of(pipe.unet, pipe.text_encoder, pipe.vae)
    with pytest.raises(BaseModelMismatchError):
        applied(pipe, tmp_path, audit_key, membranes=[wrong])
    assert same_state(before, state_of(pipe.unet, pipe.text_encoder, pipe.vae))
    assert not (tmp_path / "audit").exists()


def test_a_membrane_that_erases_nothing_is_refused(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with pytest.raises(FormatError, match="erases nothing"):
        applied(pipe, tmp_path, audit_key, membranes=[random_membrane(pipe, size=0.0)])


def test_an_audit_folder_that_cannot_be_written_leaves_nothing(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    from safegen.errors import AuditWriteError

    (tmp_path / "audit").write_text("a file")
    before = state_of(pipe.unet, pipe.text_encoder, pipe.vae)
    with pytest.raises(AuditWriteError):
        applied(pipe, tmp_path, audit_key)
    assert same_state(before, state_of(pipe.unet, pipe.text_encoder, pipe.vae))


def test_an_absent_folder_of_membranes_is_an_error(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with pytest.raises(MembraneNotFoundError, match="no such folder"):
        apply_policy(pipe, policy_file(tmp_path), audit_key=audit_key, membranes=[tmp_path / "none"])


def test_an_unknown_object_is_refused(tmp_path: Path, audit_key: HmacKey) -> None:
    with pytest.raises(UnsupportedBackendError, match="object is not a pipeline"):
        apply_policy(object(), policy_file(tmp_path), audit_key=audit_key)


# Modes, and policies without membranes


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
    before, attributes, base = state_of(*parts), own(pipe), draw(pipe, ["a ghost", "a robot"])
    rules = {"ghost": "erase", "robot": "refuse"}
    with applied(pipe, tmp_path, audit_key, rules, mode="disabled") as guard:
        assert same_state(before, state_of(*parts))
        assert own(pipe) == attributes
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


# What a guard tells


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


def test_an_obfuscated_name_opens_its_membrane(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    texts = ["a gh0st", "a g h o s t", "a g\u200bhost", "a gho-st"]
    base = draw(pipe, texts)
    with applied(pipe, tmp_path, audit_key) as guard:
        assert [d.outcome for d in guard.decide(texts)] == ["erase"] * 4
        assert rowwise(draw(pipe, texts), base) == [False] * 4
        assert rowwise(draw(sibling(pipe), texts), base) == [False] * 4  # decoded from token ids


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
