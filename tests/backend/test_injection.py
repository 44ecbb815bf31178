"""Attaching, opening per row, and detaching, on a real U-Net."""

from __future__ import annotations

import copy
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from tiny import random_membrane, same_state, skipped, state_of, tiny_sd
from torch import Tensor

from safegen.backend import backend_of
from safegen.backend.injection import Injection, Opening
from safegen.backend.sites import file_key
from safegen.errors import AttestationError, CoverageError
from safegen.membrane.weights import Membrane


def predict(pipe: Any, rows: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(rows, 16, 32, generator=generator).to(dtype)
    with torch.no_grad():
        return pipe.unet(x, torch.tensor(500), encoder_hidden_states=states).sample


@contextmanager
def opened(
    pipe: Any, membranes: list[Membrane], gamma: Tensor, strengths: Tensor | None = None
) -> Generator[list[Opening]]:
    """Attaches membranes and opens them by fixed permeabilities."""
    backend = backend_of(pipe)
    injection = Injection(backend.denoiser, backend.sites, membranes, backend.family)
    calls: list[Opening] = []
    sizes = strengths if strengths is not None else torch.ones(len(membranes))
    injection.attach(lambda _a, _k: Opening.of(gamma, sizes, measure=True), calls.append)
    try:
        yield calls
    finally:
        injection.detach()


def merged(membranes: list[Membrane], sizes: list[float]) -> Any:
    """A pipeline whose weights hold the sum of the products."""
    pipe = tiny_sd()
    for name, module in backend_of(pipe).sites.modules.items():
        for membrane, size in zip(membranes, sizes, strict=True):
            pair = membrane.factors[file_key(name)]
            product = pair.up.double().flatten(1) @ pair.down.double().flatten(1) * (pair.alpha / pair.rank)
            module.weight.data += (size * product).view(module.weight.shape).float()
    return pipe


def test_a_whole_denoiser_equals_merged_weights(pipe: Any) -> None:
    membranes = [random_membrane(pipe, seed=1, size=0.1), random_membrane(pipe, seed=2, rank=4, size=0.1)]
    gamma = torch.tensor([[0.7, 0.25]]).expand(3, 2)
    with opened(pipe, membranes, gamma, torch.tensor([1.0, 2.0])):
        found = predict(pipe)
    wanted = predict(merged(membranes, [0.7, 0.5]))
    assert (wanted - predict(pipe)).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_rows_are_opened_apart_and_shut_rows_keep_every_bit(pipe: Any) -> None:
    membranes = [random_membrane(pipe, seed=1), random_membrane(pipe, seed=2)]
    base = predict(pipe)
    gamma = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
    with opened(pipe, membranes, gamma) as calls:
        found = predict(pipe)
    assert torch.equal(found[1], base[1])
    assert (found[[0, 2]] - base[[0, 2]]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    for row, (k, size) in {0: (0, 1.0), 2: (1, 0.5)}.items():
        with opened(pipe, [membranes[k]], torch.full((3, 1), size)):
            torch.testing.assert_close(found[row], predict(pipe)[row], atol=1e-5, rtol=1e-4)
    (call,) = calls
    assert call.fired == set(backend_of(pipe).sites.modules)
    assert call.effects is not None
    effects = torch.stack(call.effects)
    assert effects.shape == (48, 2, 2)  # sites, open rows, membranes
    assert ((effects > 0) == torch.tensor([[True, False], [False, True]])).all()


def test_all_shut_is_the_base_model_bit_for_bit(pipe: Any) -> None:
    base = predict(pipe)
    with opened(pipe, [random_membrane(pipe)], torch.zeros(3, 1)) as calls:
        assert torch.equal(predict(pipe), base)
    assert len(calls[0].fired) == 48  # shut sites are counted too


def test_the_measured_effect_is_the_ratio_of_norms(pipe: Any) -> None:
    membrane = random_membrane(pipe, rank=2)
    name, module = next(iter(backend_of(pipe).sites.modules.items()))
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    with opened(pipe, [membrane], torch.tensor([[0.5], [0.0], [1.0]])) as calls:
        predict(pipe)
    handle.remove()
    x, after = seen[0]
    with torch.no_grad():
        base = module(x)
    wanted = ((after - base).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1))[[0, 2]]
    assert name in calls[0].fired
    assert calls[0].effects is not None
    torch.testing.assert_close(calls[0].effects[0][:, 0], wanted, atol=1e-4, rtol=1e-3)


def test_detaching_is_the_exact_inverse(pipe: Any) -> None:
    before, base = state_of(pipe.unet), predict(pipe)
    with opened(pipe, [random_membrane(pipe)], torch.ones(3, 1)):
        assert list(pipe.unet.state_dict()) == [k[3:] for k in before if isinstance(before[k], Tensor)]
        assert not torch.equal(predict(pipe), base)
    assert same_state(before, state_of(pipe.unet))
    assert torch.equal(predict(pipe), base)


def test_an_exception_inside_the_denoiser_leaves_nothing_open(pipe: Any) -> None:
    base = predict(pipe)

    def fail(*_args: Any) -> None:
        raise RuntimeError("out of memory")

    with opened(pipe, [random_membrane(pipe)], torch.ones(3, 1)) as calls:
        handle = pipe.unet.conv_out.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            predict(pipe)
        handle.remove()
        assert calls == []
    assert torch.equal(predict(pipe), base)


def test_a_site_that_runs_outside_of_the_guarded_forward_refuses(pipe: Any) -> None:
    name, module = next(iter(backend_of(pipe).sites.modules.items()))
    assert module.weight.ndim == 4
    x = torch.zeros(1, module.weight.shape[1], 4, 4)
    with opened(pipe, [random_membrane(pipe)], torch.zeros(3, 1)), pytest.raises(AttestationError, match=name):
        module(x)
    module(x)


def test_a_denoiser_whose_root_attachment_is_gone_refuses(pipe: Any) -> None:
    with opened(pipe, [random_membrane(pipe)], torch.zeros(3, 1)):
        root = pipe.unet.__dict__.pop("forward")
        with pytest.raises(AttestationError, match="outside of the denoiser's guarded forward"):
            predict(pipe)
        pipe.unet.__dict__["forward"] = root
        predict(pipe)


def test_a_skipped_site_is_a_coverage_error(pipe: Any) -> None:
    block = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0]
    with opened(pipe, [random_membrane(pipe)], torch.zeros(3, 1)) as calls:
        block.attn2.forward = skipped
        try:
            with pytest.raises(CoverageError, match=r"4 of 48 planned sites did not run.*attn2"):
                predict(pipe)
        finally:
            del block.attn2.__dict__["forward"]
        assert calls == []


def chunked(pipe: Any, size: int | None, *, dim: int) -> None:
    """Lets the feed-forward layers work in chunks."""
    for module in pipe.unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(size, dim)


def test_a_batch_that_is_split_over_rows_is_refused(pipe: Any) -> None:
    """Chunks of one row would be matched with the wrong row's permeability."""
    with opened(pipe, [random_membrane(pipe)], torch.tensor([[1.0], [0.0], [0.0]])):
        chunked(pipe, 1, dim=0)
        try:
            with pytest.raises(CoverageError, match="1 rows of the 3 in the batch"):
                predict(pipe)
        finally:
            chunked(pipe, None, dim=0)


def test_forward_chunking_over_tokens_is_exact(pipe: Any) -> None:
    membrane = random_membrane(pipe)
    with opened(pipe, [membrane], torch.ones(3, 1)):
        whole = predict(pipe)
        chunked(pipe, 4, dim=1)
        try:
            torch.testing.assert_close(predict(pipe), whole, atol=1e-5, rtol=1e-4)
        finally:
            chunked(pipe, None, dim=0)


def test_a_deep_copy_is_guarded_on_its_own_weights_and_comes_free_with_the_original(pipe: Any) -> None:
    base, membrane = predict(pipe), random_membrane(pipe)
    other = tiny_sd(seed=1)
    with opened(other, [membrane], torch.ones(3, 1)):
        wanted = predict(other)
    with opened(pipe, [membrane], torch.ones(3, 1)) as calls:
        opened_output = predict(pipe)
        twin = copy.copy(pipe)
        twin.unet = copy.deepcopy(pipe.unet)
        assert torch.equal(predict(twin), opened_output)
        twin.unet.load_state_dict(tiny_sd(seed=1).unet.state_dict())
        assert torch.equal(predict(twin), wanted)
        assert torch.equal(predict(pipe), opened_output)
        assert [len(call.fired) for call in calls] == [48] * 4
        again = twin.unet = copy.deepcopy(twin.unet)
        site = again.get_submodule("mid_block.attentions.0.proj_in")
        attachment = site.__dict__.pop("forward")
        with pytest.raises(AttestationError, match=r"site mid_block\.attentions\.0\.proj_in no longer carries"):
            predict(twin)
        site.__dict__["forward"] = attachment
        assert torch.equal(predict(twin), wanted)
    assert torch.equal(predict(pipe), base)
    assert torch.equal(predict(twin), predict(tiny_sd(seed=1)))
    assert not any("forward" in module.__dict__ for unet in (pipe.unet, again) for module in unet.modules())


def test_what_cannot_be_deep_copied_is_refused(pipe: Any) -> None:
    hooks: Any = pytest.importorskip("accelerate.hooks")
    with opened(pipe, [random_membrane(pipe)], torch.ones(3, 1)):
        for part in (pipe.unet.mid_block, pipe.unet.mid_block.attentions[0].proj_in):
            with pytest.raises(AttestationError, match="a part of a UNet2DConditionModel under a policy"):
                copy.deepcopy(part)
    hooked = tiny_sd()
    hooks.add_hook_to_module(hooked.unet.mid_block.attentions[0].proj_in, hooks.ModelHook())
    with (
        opened(hooked, [random_membrane(hooked)], torch.ones(3, 1)),
        pytest.raises(AttestationError, match="hook on 'forward' that was installed before the policy"),
    ):
        copy.deepcopy(hooked.unet)


def test_a_shallow_copy_is_guarded(pipe: Any) -> None:
    base = predict(pipe)
    with opened(pipe, [random_membrane(pipe)], torch.ones(3, 1)):
        twin = copy.copy(pipe)
        twin.unet = copy.copy(pipe.unet)
        assert torch.equal(predict(twin), predict(pipe))
        assert not torch.equal(predict(pipe), base)


def gradients(pipe: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 16, 32, generator=generator)
    pipe.unet.zero_grad()
    pipe.unet(x, torch.tensor(500), encoder_hidden_states=states).sample.square().sum().backward()
    return [p.grad.clone() for p in pipe.unet.parameters() if p.grad is not None]


def test_gradient_checkpointing_runs_blocks_again_with_the_same_opening(pipe: Any) -> None:
    pipe.unet.train()
    gamma = torch.tensor([[1.0], [0.5]])
    closed = gradients(pipe)
    with opened(pipe, [random_membrane(pipe)], gamma):
        wanted = gradients(pipe)
        pipe.unet.enable_gradient_checkpointing()
        functions = [
            id(m._gradient_checkpointing_func) for m in pipe.unet.modules() if hasattr(m, "gradient_checkpointing")
        ]
        found = gradients(pipe)
        assert functions == [
            id(m._gradient_checkpointing_func) for m in pipe.unet.modules() if hasattr(m, "gradient_checkpointing")
        ]
        pipe.unet.disable_gradient_checkpointing()
    pipe.unet.eval()
    assert not all(torch.allclose(a, b) for a, b in zip(wanted, closed, strict=True))
    for first, second in zip(found, wanted, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    half = tiny_sd()
    half.unet.to(dtype)
    membrane = random_membrane(half, size=0.3)
    base = predict(half, dtype=dtype)
    with opened(half, [membrane], torch.tensor([[1.0], [0.0], [1.0]])):
        found = predict(half, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found[1], base[1])
    full = tiny_sd()
    with opened(full, [membrane], torch.ones(3, 1)):
        wanted = predict(full)
    assert (found[0].float() - wanted[0]).norm() < 0.15 * (wanted[0] - base[0].float()).norm()


def test_threads_have_their_own_openings(pipe: Any) -> None:
    """One denoiser, one injection; what is open follows the thread that calls."""
    membrane = random_membrane(pipe)
    backend = backend_of(pipe)
    injection = Injection(backend.denoiser, backend.sites, [membrane], backend.family)
    local = threading.local()
    wanted: dict[float, Tensor] = {}
    for size in (0.0, 0.25, 1.0):
        with opened(pipe, [membrane], torch.full((3, 1), size)):
            wanted[size] = predict(pipe)
    wrong: list[float] = []
    start = threading.Barrier(3)

    def work(size: float) -> None:
        local.size = size
        start.wait()
        wrong.extend(size for _ in range(6) if not torch.equal(predict(pipe), wanted[size]))

    injection.attach(lambda _a, _k: Opening.of(torch.full((3, 1), local.size), torch.ones(1)), lambda _: None)
    threads = [threading.Thread(target=work, args=(size,)) for size in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    injection.detach()
    assert wrong == []
