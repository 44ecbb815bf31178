"""Several threads on one denoiser: every image is the one that a single thread draws, and so is what is recorded."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import applied, draw, random_membrane, records, tiny_sd
from torch import Tensor

from safegen import PromptRefused
from safegen.audit import HmacKey, verify

PROMPTS = ("a ghost", "a fox", "the ghost in a photo", "a santa", "a fox and ghost", "the mouse")


def per_call(pipe: Any) -> Any:
    """A pipeline of one's own on shared parts, as the diffusers server recipe makes one per request."""
    # Scheduler and tokenizer cannot be shared between threads upstream.
    parts: dict[str, Any] = dict(tokenizer=copy.deepcopy(pipe.tokenizer), scheduler=copy.deepcopy(pipe.scheduler))
    own: Any = StableDiffusionPipeline.from_pipe(pipe, **parts)
    own.set_progress_bar_config(disable=True)
    return own


def permeabilities(folder: Path) -> dict[str, set[tuple[float | None, ...]]]:
    found: dict[str, set[tuple[float | None, ...]]] = {}
    for record in records(folder, "gated"):
        assert record.prompt is not None
        values = tuple(m.permeability for m in record.membranes or ())
        found.setdefault(record.prompt.hmac, set()).add(values)
    return found


def test_six_threads_draw_and_record_what_one_does(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    membranes = [random_membrane(pipe, "ghost", floor=1.0), random_membrane(pipe, "fox", floor=0.5, seed=1)]
    for name in ("one", "six"):
        (tmp_path / name).mkdir()

    def work(prompt: str) -> list[Tensor]:
        start.wait()
        return [draw(per_call(pipe), prompt, seed=k) for k in range(4)]

    rules = {"ghost": "erase", "fox": "erase"}
    start = threading.Barrier(1)
    with applied(pipe, tmp_path / "one", audit_key, rules, membranes=membranes):
        wanted = {prompt: work(prompt) for prompt in PROMPTS}
    start = threading.Barrier(len(PROMPTS))
    with applied(pipe, tmp_path / "six", audit_key, rules, membranes=membranes), ThreadPoolExecutor(6) as pool:
        found = dict(zip(PROMPTS, pool.map(work, PROMPTS), strict=True))

    wrong = [(p, k) for p in PROMPTS for k in range(4) if not torch.equal(found[p][k], wanted[p][k])]
    assert wrong == []
    assert permeabilities(tmp_path / "six") == permeabilities(tmp_path / "one")
    assert len({v for values in permeabilities(tmp_path / "one").values() for v in values}) > 4
    kinds = [r.kind for r in records(tmp_path / "six")]
    assert (kinds.count("generated"), len(records(tmp_path / "six", "run.failed"))) == (24, 0)
    digests = [
        sorted(d for r in records(tmp_path / name, "generated") if r.output for d in r.output.sha256)
        for name in ("one", "six")
    ]
    assert digests[0] == digests[1]
    assert verify(tmp_path / "six" / "audit").ok


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_another_threads_negative_prompt_does_not_shut_a_membrane(tmp_path: Path, audit_key: HmacKey) -> None:
    """The same embeddings are a prompt here and a negative prompt there, at the same time."""
    pipe = tiny_sd()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def predict(prompt: Tensor, negative: Tensor) -> Tensor:
        return pipe.unet(x, 500, encoder_hidden_states=torch.cat([negative, prompt])).sample

    with applied(pipe, tmp_path, audit_key):
        ghost, empty = pipe.encode_prompt("a ghost", "cpu", 1, True)
        wanted = predict(ghost, empty)
        ghost, empty = pipe.encode_prompt("a ghost", "cpu", 1, True)
        other = in_thread(lambda: predict(*pipe.encode_prompt("a fox", "cpu", 1, True, negative_prompt="a ghost")))
        found = predict(ghost, empty)
    base = predict(ghost, empty)
    assert torch.equal(found, wanted)
    assert torch.equal(found[0], base[0])
    assert not torch.equal(found[1], base[1])
    fox = pipe.encode_prompt("a fox", "cpu", 1, False)[0]
    assert torch.equal(other, predict(fox, ghost))  # and there it opens nothing


def test_texts_are_recorded_as_their_own_thread_wrote_them(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    x = torch.randn(1, 4, 8, 8)
    with applied(pipe, tmp_path, audit_key), torch.no_grad():
        states, _ = pipe.encode_prompt("A  GHOST", "cpu", 1, False)
        in_thread(lambda: pipe.encode_prompt("a ghost", "cpu", 1, False))
        pipe.unet(x, 500, encoder_hidden_states=states)
    (gated,) = records(tmp_path, "gated")
    assert gated.prompt is not None
    assert gated.prompt.hmac == audit_key.hmac("A  GHOST")


def test_a_refusal_in_one_thread_does_not_stop_another(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = tiny_sd()
    base = draw(pipe, "a fox", steps=6)
    refused: list[str] = []

    def refuse() -> None:
        for _ in range(6):
            with pytest.raises(PromptRefused):
                draw(per_call(pipe), "a robot")
            refused.append("robot")

    with (
        applied(pipe, tmp_path, audit_key, {"ghost": "erase", "robot": "refuse"}),
        ThreadPoolExecutor(2) as pool,
    ):
        future = pool.submit(refuse)
        images = [pool.submit(lambda: draw(per_call(pipe), "a fox", steps=6)).result() for _ in range(3)]
        future.result()
    assert all(torch.equal(image, base) for image in images)
    assert len(refused) == 6


def test_work_that_a_host_moves_into_a_thread_of_its_own_keeps_its_conditioning(
    tmp_path: Path, audit_key: HmacKey
) -> None:
    """Encoded here, drawn there: the words are known, that a row was a negative prompt is not, so it opens."""
    pipe = tiny_sd()
    base = draw(pipe, "a ghost", guidance_scale=1)
    options: dict[str, Any] = dict(num_inference_steps=3, guidance_scale=1, output_type="pt")
    with applied(pipe, tmp_path, audit_key):
        wanted = draw(pipe, "a ghost", guidance_scale=1)
        states, _ = pipe.encode_prompt("a ghost", "cpu", 1, False)
        found = in_thread(
            lambda: pipe(prompt_embeds=states, generator=torch.Generator().manual_seed(0), **options).images
        )
    assert torch.equal(found, wanted)
    assert not torch.equal(found, base)
