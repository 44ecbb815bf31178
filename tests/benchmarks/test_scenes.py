"""The benchmark of scenes acts where its variants say, and opens `plain` as the guard does."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from safegen import apply_policy, mini
from safegen.audit import HmacKey
from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.bundle.store import MEMBRANE_FILE
from safegen.membrane.file import read_membrane
from safegen.membrane.weights import Membrane
from safegen.mini.examine import draw_images
from safegen.resources import shipped

PROMPT = "a fox next to father christmas in the style of ink"
VALUE = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
OTHER = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"


@pytest.fixture(scope="module")
def scenes() -> Any:
    return importlib.import_module("scenes")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return mini.load()


@pytest.fixture(scope="module")
def backend(pipe: Any) -> Backend:
    return backend_of(pipe)


@pytest.fixture(scope="module")
def membrane() -> Membrane:
    return read_membrane(shipped("membranes") / "mini" / "santa-claus" / MEMBRANE_FILE)


@pytest.mark.parametrize("prompt", [PROMPT, "santa claus beside an owl, clay style"])
def test_the_named_tokens_are_those_of_the_phrase(scenes: Any, backend: Backend, prompt: str) -> None:
    acts = scenes.positions(backend, prompt, "santa-claus", scenes.VARIANTS["tokens"])
    words = backend.words(backend.tokenise([prompt])[0].tolist())
    named = [text for (_, text), on in zip(words, acts[1:].tolist(), strict=False) if on]
    assert named in (["father", "christmas"], ["santa", "claus"])
    assert acts.sum() == 2
    ended = scenes.positions(backend, prompt, "santa-claus", scenes.VARIANTS["tokens and end"])
    assert ended[: len(words) + 1].equal(acts[: len(words) + 1])
    assert ended[len(words) + 1 :].all()


def test_a_prompt_without_the_name_is_no_case(scenes: Any, backend: Backend) -> None:
    with pytest.raises(ValueError, match="names no 'santa claus'"):
        scenes.positions(backend, "a fox and an owl", "santa-claus", scenes.VARIANTS["tokens"])


@torch.no_grad()
def test_positions_left_out_are_the_base_models_bit_for_bit(scenes: Any, backend: Backend, membrane: Membrane) -> None:
    ids = backend.tokenise([PROMPT])
    x = backend.encode(ids).repeat(2, 1, 1)
    site = backend.sites.modules[VALUE]
    base = site(x)
    with scenes.opened(backend, membrane, scenes.VARIANTS["tokens"], [PROMPT]):
        found = site(x)
    acts = scenes.positions(backend, PROMPT, "santa-claus", scenes.VARIANTS["tokens"]).bool()
    assert torch.equal(found[0], base[0])
    assert torch.equal(found[1][~acts], base[1][~acts])
    assert not torch.isclose(found[1][acts], base[1][acts]).all(dim=1).any()
    assert torch.equal(site(x), base)


@torch.no_grad()
def test_other_sites_are_open_unless_they_are_closed(scenes: Any, backend: Backend, membrane: Membrane) -> None:
    variant = scenes.VARIANTS["tokens and end, other sites closed"]
    site: Any = backend.sites.modules[OTHER]
    x = torch.randn(2, 4, site.in_features, generator=torch.Generator().manual_seed(0))
    base = site(x)
    with scenes.opened(backend, membrane, variant, [PROMPT]):
        assert torch.equal(site(x), base)
    with scenes.opened(backend, membrane, replace(variant, elsewhere=True), [PROMPT]):
        assert not torch.equal(site(x)[1], base[1])


def test_plain_draws_what_the_guard_draws(scenes: Any, pipe: Any, membrane: Membrane, tmp_path: Path) -> None:
    (image,) = scenes.draw(pipe, membrane, scenes.VARIANTS["plain"], [PROMPT], seed=1)
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "apiVersion: safegen.dev/v1\nkind: Policy\nmetadata: {id: scenes, version: 1.0.0}\n"
        "rules:\n  - {id: claus, concept: santa-claus, category: custom, on_missing: error}\n"
    )
    key = HmacKey(b"a fixed key of the tests ........")
    with apply_policy(pipe, policy, audit=tmp_path / "audit", audit_key=key):
        (guarded,) = draw_images(pipe, [PROMPT], seed=1)
    (base,) = scenes.draw(pipe, membrane, None, [PROMPT], seed=1)
    one, two, bare = (np.asarray(picture, dtype=np.int16) for picture in (image, guarded, base))
    assert np.abs(one - two).max() <= 2  # the guard adds in another order
    assert np.abs(one - bare).max() > 32


def test_ratios_are_to_the_base_models_rates_and_nothing_shown_is_no_success(scenes: Any) -> None:
    figures = ("erased object seen", "other object seen")
    likely = ("erased object among the first 5", "other object among the first 5")
    base = dict.fromkeys(figures, 0.5) | dict.fromkeys((*likely, "alone, judged as the target"), 0.0)
    after = dict(zip(figures, (0.125, 0.4), strict=True)) | dict.fromkeys((*likely, "alone, judged as the target"), 0.0)
    found = scenes.ratios(base, after)
    assert found["erased object gone"] == 0.75
    assert found["other object kept"] == 0.8
    assert found["gone, first 5"] == found["kept, first 5"] == 0.0


def test_the_command_prints_what_it_measured_and_its_exit_code_tells(scenes: Any) -> None:
    app = typer.Typer()
    app.command()(scenes.main)
    result = CliRunner().invoke(app, ["--scenes", "1", "--concept", "robot", "--variant", "tokens", "--json"])
    report = json.loads(result.stdout)
    assert set(report["by_concept"]["robot"]) == {"base", "plain", "tokens"}
    assert report["results"]["tokens: alone, judged as the target"]["before"] == 1.0
    assert result.exit_code == int(not all(floor["holds"] for floor in report["floors"]))
    refused = CliRunner().invoke(app, ["--variant", "nowhere"])
    assert refused.exit_code == 2
