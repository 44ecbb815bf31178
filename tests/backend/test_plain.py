"""A denoiser that is not of diffusers, guarded through `TorchPipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import applied, random_membrane, records, rowwise, same_state, state_of, tiny_sd
from torch import Tensor, nn

from safegen.audit import HmacKey
from safegen.backend import TorchPipeline, backend_of
from safegen.errors import AttestationError, CoverageError, UnsupportedBackendError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + nn.functional.scaled_dot_product_attention(
            self.query(self.norm(x)), self.key(context), self.value(context)
        )
        return x + self.outer(nn.functional.gelu(self.inner(x)))


class Denoiser(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList([Block(width), Block(width)])

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        tokens = self.into(x.flatten(2).transpose(1, 2)) + sigma.view(-1, 1, 1) / 1000
        for block in self.blocks:
            tokens = block(tokens, context)
        return self.out(tokens).transpose(1, 2).reshape(x.shape)


def host() -> TorchPipeline:
    parts = tiny_sd()
    torch.manual_seed(0)
    return TorchPipeline(
        Denoiser().eval(),
        parts.text_encoder,
        parts.tokenizer,
        Block,
        (4, 8, 8),
        states="context",
        timestep="sigma",
        decoder=parts.vae,
    )


@torch.no_grad()
def draw(pipe: TorchPipeline, prompts: list[str], negatives: list[str] | None = None) -> Tensor:
    """A sampler of one's own, with the denoiser called once for the prompts and once for the negative prompts."""
    states, others = pipe.encode_prompt(prompts, negatives)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))] * len(prompts))
    for sigma in (900.0, 500.0, 100.0):
        t = torch.full((len(x),), sigma)
        found = pipe.denoiser(x, t, context=states)
        if others is not None:
            found = found + 2 * (found - pipe.denoiser(x, t, others))
        x = x - 0.3 * found
    decoder: Any = pipe.vae
    return decoder.decode(x).sample


@pytest.mark.parametrize("negatives", [None, ["a robot", "mickey mouse"]])
def test_rows_are_gated(negatives: list[str] | None, tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = host()
    base, before = draw(pipe, ["a ghost", "a fox"], negatives), state_of(pipe.denoiser, pipe.text_encoder)
    with applied(pipe, tmp_path, audit_key):
        assert rowwise(draw(pipe, ["a ghost", "a fox"], negatives), base) == [False, True]
    assert same_state(before, state_of(pipe.denoiser, pipe.text_encoder))
    assert torch.equal(draw(pipe, ["a ghost", "a fox"], negatives), base)
    drawn = records(tmp_path, "generated")
    assert [[m.opened for m in record.membranes or ()] for record in drawn] == [[True], [False]]
    assert drawn[0].attest is not None
    assert drawn[0].attest.calls == (3 if negatives is None else 6)


def test_negative_prompts_in_a_call_of_their_own_follow_the_prompts(tmp_path: Path, audit_key: HmacKey) -> None:
    """`guidance: both` opens on them what it opens on the prompts, also on new ones."""
    pipe, found = host(), list[Tensor]()
    prompts, negatives = ["a ghost", "a fox"], ["a robot", "a robot"]
    base = draw(pipe, prompts, negatives)
    for guidance in ("conditional", "both"):
        (tmp_path / guidance).mkdir()
        with applied(pipe, tmp_path / guidance, audit_key, extra=f", transport: {{guidance: {guidance}}}"):
            found.append(draw(pipe, prompts, negatives))
            assert rowwise(found[-1], base) == [False, True]
    assert rowwise(*found) == [False, True]


def test_negative_prompts_whose_prompts_are_not_known_yet_open_all(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = host()
    x, t = torch.randn(1, 4, 8, 8), torch.full((1,), 500.0)
    with torch.no_grad():
        states, others = pipe.encode_prompt(["a fox"], ["a robot"])
        plain = pipe.denoiser(x, t, states), pipe.denoiser(x, t, others)
        with applied(pipe, tmp_path, audit_key, extra=", transport: {guidance: both}"):
            pipe.encode_prompt(["a fox"], ["a robot"])
            first, second = pipe.denoiser(x, t, others), pipe.denoiser(x, t, states)
            assert (torch.equal(first, plain[1]), torch.equal(second, plain[0])) == (False, True)


def test_sites_are_those_of_the_blocks() -> None:
    sites = backend_of(host()).sites.modules
    assert set(sites) == {f"blocks.{k}.{name}" for k in (0, 1) for name in ("query", "key", "value", "inner", "outer")}


def test_a_block_that_goes_round_its_linears_is_stopped(tmp_path: Path, audit_key: HmacKey) -> None:
    """torch's own attention module never calls its output projection, but takes the weight."""

    class Fast(Block):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return super().forward(x + self.attention(x, context, context, need_weights=False)[0], context)

    pipe = host()
    pipe.denoiser.blocks = nn.ModuleList([Fast(32)])
    with applied(pipe, tmp_path, audit_key), pytest.raises(CoverageError, match=r"attention\.out_proj"):
        draw(pipe, ["a fox"])


def test_foreign_states_open_everything(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = host()
    states, _ = pipe.encode_prompt(["a fox", "a fox"])
    states[1] += 0.01
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0)
    with torch.no_grad():
        plain = pipe.denoiser(x, t, states)
        with applied(pipe, tmp_path, audit_key):
            pipe.encode_prompt(["a fox"])
            assert rowwise(pipe.denoiser(x, t, states), plain) == [True, False]
            with pytest.raises(UnsupportedBackendError, match="without context"):
                pipe.denoiser(x, t, None)


def test_a_replaced_denoiser_is_refused(tmp_path: Path, audit_key: HmacKey) -> None:
    pipe = host()
    with applied(pipe, tmp_path, audit_key, membranes=[random_membrane(pipe)]):
        kept, pipe.denoiser = pipe.denoiser, Denoiser()
        with pytest.raises(AttestationError, match=r"pipe\.denoiser was replaced"):
            draw(pipe, ["a fox"])
        pipe.denoiser = kept
