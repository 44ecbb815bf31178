"""Other pipelines on the same parts are guarded too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from tiny import (
    applied,
    attributes,
    draw,
    draw_embeds,
    embeds,
    records,
    rowwise,
    same_state,
    state_of,
)
from torch import Tensor

from safegen import PromptRefused
from safegen.audit import HmacKey
from safegen.errors import AlreadyAppliedError

pytestmark = pytest.mark.usefixtures("untouched")


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
        # Nor where nothing is encoded between the two runs.
        both = torch.cat([embeds(pipe, "a ghost"), embeds(pipe, "a fox")])
        draw(pipe, "a fox", negative_prompt="a ghost")
        assert rowwise(draw_embeds(other, both, guidance_scale=1), base) == [False, True]


def test_a_second_guard_is_refused_without_mutation(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    with applied(pipe, tmp_path, audit_key):
        parts = (pipe.unet, pipe.text_encoder, pipe.vae)
        held, kept = state_of(*parts), attributes(pipe)
        erased = draw(pipe, "a ghost")
        for target in (pipe, sibling(pipe)):
            with pytest.raises(AlreadyAppliedError, match="already carries a policy"):
                applied(target, tmp_path, audit_key)
        assert same_state(held, state_of(*parts))
        assert attributes(pipe) == kept
        assert torch.equal(draw(pipe, "a ghost"), erased)


def test_an_obfuscated_name_opens_its_membrane(pipe: Any, tmp_path: Path, audit_key: HmacKey) -> None:
    texts = ["a gh0st", "a g h o s t", "a g\u200bhost", "a gho-st"]
    base = draw(pipe, texts)
    with applied(pipe, tmp_path, audit_key) as guard:
        assert [d.outcome for d in guard.decide(texts)] == ["erase"] * 4
        assert rowwise(draw(pipe, texts), base) == [False] * 4
        assert rowwise(draw(sibling(pipe), texts), base) == [False] * 4  # decoded from token ids
