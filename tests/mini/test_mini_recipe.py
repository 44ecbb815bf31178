"""The recipe of safegen-mini: pictures, whitening, the loop that goes on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from safegen.errors import TrainingError
from safegen.mini import art
from safegen.mini.autoencoder import encode, new_autoencoder, whiten
from safegen.mini.build import draw_pictures
from safegen.mini.catalogue import OBJECTS, STYLE_NAMES
from safegen.mini.diffusion import Latents, Sampler, is_held_out, new_text_tower, new_unet, tokenise
from safegen.mini.loop import Ema, run_steps, trapezoid


def _disc() -> art.Sprite:
    """A red disc on nothing."""
    y, x = np.mgrid[:128, :128]
    sprite = np.zeros((128, 128, 4), np.uint8)
    sprite[(x - 64) ** 2 + (y - 64) ** 2 < 50**2] = (220, 20, 30, 255)
    return sprite


@pytest.mark.parametrize("style", STYLE_NAMES)
def test_a_style_has_its_ground_and_leaves_the_object_visible(style: str) -> None:
    picture = art.draw([_disc()], [art.Box(2, 2, 60)], style)
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[0, 0]) == art.GROUNDS[style]
    middle = tuple(int(v) for v in picture[32, 32])
    assert middle == art.LINES.get(style, (220, 20, 30))


def test_pixel_style_is_made_of_squares() -> None:
    picture = art.draw([_disc()], [art.Box(3, 1, 58)], "pixel").reshape(16, 4, 16, 4, 3)
    assert (picture == picture[:, :1, :, :1]).all()


def test_scenes_keep_to_their_halves() -> None:
    for seed in range(50):
        left, right = art.scene_boxes(np.random.default_rng(seed))
        assert left.left >= 0
        assert left.left + left.edge <= 32
        assert right.left >= 32
        assert right.left + right.edge <= 64
        picture = art.draw([_disc(), _disc()], [left, right], "noto")
        assert (picture[:, 16] != 255).any()
        assert (picture[:, 48] != 255).any()


def test_pictures_cover_every_pair_and_say_what_they_show() -> None:
    sprites = np.broadcast_to(_disc(), (len(OBJECTS), len(STYLE_NAMES), 128, 128, 4))
    pictures, labels = draw_pictures(sprites, repeats=1, scenes=5, seed=0)
    assert len(pictures) == len(labels) == len(OBJECTS) * len(STYLE_NAMES) + 5
    assert len({(a, j) for a, b, j in labels.tolist() if b < 0}) == len(OBJECTS) * len(STYLE_NAMES)
    again, _ = draw_pictures(sprites, repeats=1, scenes=5, seed=0)
    assert (pictures == again).all()


def test_missing_icons_are_all_named(tmp_path: Path) -> None:
    for package in art.PACKAGES:
        folder = tmp_path / "node_modules" / package
        folder.mkdir(parents=True)
        (folder / "icons.json").write_text('{"icons": {}}')
        (folder / "chars.json").write_text("{}")
    with pytest.raises(TrainingError, match=f"^{len(OBJECTS) * len(STYLE_NAMES)} icons are not .*robot in @iconify"):
        art.load_sprites(tmp_path)


@torch.no_grad()
def test_whitening_changes_the_latents_and_not_the_function() -> None:
    torch.manual_seed(0)
    vae: Any = new_autoencoder().eval()
    pictures = torch.randint(0, 256, (24, 64, 64, 3), dtype=torch.uint8)
    before = vae.decode(encode(vae, pictures)).sample
    whiten(vae, pictures)
    latents = encode(vae, pictures)
    torch.testing.assert_close(vae.decode(latents).sample, before, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_held_out_pairs_are_never_drawn_for_training() -> None:
    singles = torch.zeros(1, len(OBJECTS), len(STYLE_NAMES), 4, 16, 16)
    for i in range(len(OBJECTS)):
        for j in range(len(STYLE_NAMES)):
            singles[0, i, j] = float(is_held_out(i, j))
    sampler = Sampler(Latents(singles, torch.zeros(1, 4, 16, 16), torch.tensor([[0, 1, 0]])))
    pictures, texts = sampler.batch(3000, np.random.default_rng(0))
    assert not pictures.any()
    assert 0.05 < sum(text == "" for text in texts) / len(texts) < 0.15


def _train(steps: int, checkpoint: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = Ema(model, 0.9)

    def step(_: int) -> dict[str, float]:
        loss = (model(torch.randn(8, 4)) - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        return {"loss": loss.item()}

    state = {"model": model, "optimizer": optimizer, "ema": ema}
    run_steps("test", steps, step, checkpoint=checkpoint, state=state, every=3)
    return dict(model.state_dict()) | {f"ema.{k}": v for k, v in ema.shadow.items()}


def test_a_stage_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = _train(9, tmp_path / "whole.pt")
    _train(6, tmp_path / "parts.pt")
    parts = _train(9, tmp_path / "parts.pt")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_learning_rate_does_not_depend_on_the_steps_before_it_decays() -> None:
    assert [trapezoid(i, 1000, warmup=10) for i in (0, 9, 500)] == [0.1, 1.0, 1.0]
    assert trapezoid(500, 1000, warmup=10) == trapezoid(500, 2000, warmup=10)
    rates = [trapezoid(i, 1000, warmup=10) for i in range(650, 1001)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0


def test_model_parts_have_the_stated_shape() -> None:
    from safegen.mini.captions import new_tokenizer

    tokenizer = new_tokenizer()
    unet, text = new_unet(), new_text_tower(tokenizer)
    assert 8e6 < sum(p.numel() for p in unet.parameters()) < 11e6
    ids = tokenise(tokenizer, ["a fox", "an owl in the style of ink"])
    with torch.no_grad():
        out = unet(torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), text(ids).last_hidden_state).sample
    assert out.shape == (2, 4, 16, 16)
