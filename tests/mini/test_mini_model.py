"""The embedded model: stock diffusers loads it, it draws what it is asked, within its size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safegen import mini
from safegen.backend import backend_of
from safegen.mini.card import card_text
from safegen.mini.catalogue import OBJECTS, STYLES, is_held_out, with_article
from safegen.mini.credits import credits_text
from safegen.mini.examine import EXAMINED, draw_images, examine, questions, write_figures
from safegen.mini.judge import Judge


@pytest.fixture(scope="module")
def pipe() -> Any:
    return mini.load()


@pytest.fixture(scope="module")
def judge() -> Judge:
    return mini.load_judge()


def test_stock_diffusers_loads_and_draws_without_safegen() -> None:
    code = (
        "import sys; from diffusers import StableDiffusionPipeline\n"
        f"pipe = StableDiffusionPipeline.from_pretrained({str(mini.folder())!r})\n"
        "image = pipe('a fox', num_inference_steps=2).images[0]\n"
        "print(image.size, type(pipe.tokenizer).__name__, type(pipe.text_encoder).__name__, type(pipe.vae).__name__,\n"
        "      'safegen' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "(64, 64) CLIPTokenizer CLIPTextModel AutoencoderKL False"


def test_the_folder_is_small_and_holds_half_precision_safetensors() -> None:
    files = [p for p in mini.folder().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24e6
    assert not [p for p in files if p.suffix in {".bin", ".pt", ".ckpt"}]
    for path in mini.folder().rglob("*.safetensors"):
        header = path.read_bytes()
        entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        assert {e["dtype"] for k, e in entries.items() if k != "__metadata__"} <= {"F16", "I64"}, path


def test_sites_cover_cross_attention_at_two_resolutions(pipe: Any) -> None:
    backend = backend_of(pipe)
    assert backend.family == "mini"
    blocks = {name.split(".transformer_blocks")[0] for name in backend.sites.modules if "attn2" in name}
    assert {name.split(".")[0] + name.split(".")[1] for name in blocks if name.startswith("down")} == {
        "down_blocks1",
        "down_blocks2",
    }


def test_it_draws_objects_and_styles_as_asked(pipe: Any, judge: Judge) -> None:
    asked = [(OBJECTS[i], STYLES[i % 6]) for i in range(0, len(OBJECTS), 4) if not is_held_out(i, i % 6)]
    images = draw_images(pipe, [f"{with_article(o.name)} in the style of {s.name}" for o, s in asked], seed=31)
    seen = judge.pictures(images)
    objects = [a.name == b for (a, _), b in zip(asked, seen.objects, strict=True)]
    styles = [a.name == b for (_, a), b in zip(asked, seen.styles, strict=True)]
    assert np.mean(objects) >= 0.75  # a smoke test of 30 images; the figures of 1,050 are in the model card
    assert np.mean(styles) >= 0.75


def test_the_same_seed_draws_the_same_image_whatever_the_batch(pipe: Any) -> None:
    alone = draw_images(pipe, ["a fox"], seed=5)[0]
    first = draw_images(pipe, ["a fox", "an owl"], seed=5)[0]
    assert np.abs(np.asarray(alone, int) - np.asarray(first, int)).max() <= 3


def test_the_judge_names_a_plain_picture_and_refuses_another_catalogue(judge: Judge, tmp_path: Path) -> None:
    seen = judge.pictures([Image.new("RGB", (64, 64), (28, 74, 170))])
    assert seen.styles == ("blueprint",)
    assert seen.object_probability.sum().item() == pytest.approx(1.0, abs=1e-4)
    judge.save(tmp_path, {"objects": 1.0})
    content = json.loads((tmp_path / "judge.json").read_text())
    (tmp_path / "judge.json").write_text(json.dumps(content | {"styles": ["other"]}))
    with pytest.raises(ValueError, match="other objects or styles"):
        Judge.load(tmp_path)


def test_the_model_card_states_what_was_measured() -> None:
    card = (mini.folder() / "README.md").read_text()
    assert card == card_text(mini.folder())
    figures = json.loads((mini.folder() / "figures.json").read_text())
    assert f"{figures['object']:.1%}" in card
    assert f"`python -m safegen.mini.examine --images {figures['images']:.0f} --seed {figures['seed']:.0f}`" in card
    assert "less straight way than the recipe" in card


def test_the_credits_hold_the_notices_that_the_licences_ask_for() -> None:
    credits = (mini.folder() / "CREDITS.md").read_text()
    assert credits == credits_text()
    for notice in (
        "Copyright (c) Microsoft",
        "Permission is hereby granted",
        "CC-BY 4.0",
        "Apache License, Version 2.0",
    ):
        assert notice in credits


def test_an_examination_has_left_out_and_other_pairs_whatever_its_size(pipe: Any, judge: Judge) -> None:
    figures = examine(pipe, judge, images=16, seed=1)
    assert (figures["images"], figures["images_held_out"]) == (16.0, 2.0)
    assert figures["object"] >= 0.7
    asked = questions(EXAMINED, np.random.default_rng(0))
    assert sum(q.kind == "held-out" for q in asked) == 129
    assert len(asked) == EXAMINED


def test_examining_again_renews_figures_and_card(tmp_path: Path) -> None:
    shutil.copytree(mini.folder(), tmp_path / "weights")
    shutil.copytree(mini.folder().parent / "judge_weights", tmp_path / "judge_weights")
    figures = json.loads((mini.folder() / "figures.json").read_text())
    write_figures(tmp_path / "weights", figures | {"object": 0.123})
    assert "| object as asked | 12.3% |" in (tmp_path / "weights" / "README.md").read_text()
    assert json.loads((tmp_path / "weights" / "figures.json").read_text())["object"] == 0.123
