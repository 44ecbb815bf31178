"""The membrane engine: what composing membranes costs and how exact it is, on a U-Net of Stable Diffusion 1.4's shape.

    python benchmarks/compose.py [--json] [--rounds 7]

Random weights, two threads, 32x32 latents, two rows. Every figure is the median over rounds of a ratio to the bare
U-Net timed in the same round; the peers (a loop over membranes, PEFT's adapters) are timed in the same rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from end_to_end import Floor
from rich.console import Console
from torch import Tensor, nn

from safegen.backend.injection import Injection, Opening
from safegen.backend.sites import Sites, file_key, find_sites
from safegen.membrane.delta import pool
from safegen.membrane.file import read_membrane, write_membrane
from safegen.membrane.weights import Factor, Membrane

console = Console(stderr=True)


def denoiser(**shape: Any) -> Any:
    """A U-Net with random weights; by default of Stable Diffusion 1.4's shape (859.5 M parameters)."""
    torch.manual_seed(0)
    config: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768} | shape
    return UNet2DConditionModel(**config).eval()


def random_membranes(sites: Sites, count: int) -> list[Membrane]:
    """Rank-1 membranes on every site, small enough to leave activations in range."""
    found: list[Membrane] = []
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        factors: dict[str, Factor] = {}
        for name, module in sites.modules.items():
            tail = [1, 1] if module.weight.ndim == 4 else []
            down = 0.02 * torch.randn(1, *module.weight.shape[1:], generator=generator)
            up = 0.02 * torch.randn(module.weight.shape[0], 1, *tail, generator=generator)
            factors[file_key(name)] = Factor(down, up, 1.0)
        found.append(Membrane(f"c{k}", (f"c{k}",), "bench", sites.architecture, factors))
    return pool(found)


def caller(unet: Any, size: int, width: int) -> Callable[[], Tensor]:
    """Returns a call of the denoiser on two fixed rows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, size, size, generator=generator).to(unet.dtype)
    states = torch.randn(2, 77, width, generator=generator).to(unet.dtype)

    def call() -> Tensor:
        with torch.no_grad():
            return unet(x, torch.tensor(500), encoder_hidden_states=states).sample

    return call


@contextmanager
def opened(unet: Any, sites: Sites, membranes: Sequence[Membrane], size: float) -> Generator[Opening]:
    """Attaches membranes and opens all of them for both rows; the opening is made once, as in a run."""
    injection = Injection(unet, sites, membranes, "bench")
    opening = Opening.of(torch.full((2, len(membranes)), size), torch.ones(len(membranes)))
    injection.attach(lambda _a, _k: opening.again(measure=False), lambda _: None)
    try:
        yield opening
    finally:
        injection.detach()


@contextmanager
def looped(sites: Sites, membranes: Sequence[Membrane]) -> Generator[None]:
    """The peer: each membrane adds its own product in turn, as chained adapters do."""

    def looping(module: nn.Module, factors: Sequence[Factor]) -> Callable[[Tensor], Tensor]:
        base = module.forward

        def forward(x: Tensor) -> Tensor:
            y = base(x)
            for factor in factors:
                if isinstance(module, nn.Linear):
                    y = y + nn.functional.linear(nn.functional.linear(x, factor.down), factor.up)
                else:
                    y = y + nn.functional.conv2d(nn.functional.conv2d(x, factor.down), factor.up)
            return y

        return forward

    for name, module in sites.modules.items():
        dtype = module.weight.dtype
        factors = [m.factors[file_key(name)] for m in membranes]
        cast = [Factor(f.down.to(dtype), f.up.to(dtype), f.alpha) for f in factors]
        module.__dict__["forward"] = looping(module, cast)
    try:
        yield
    finally:
        for module in sites.modules.values():
            del module.__dict__["forward"]


def ratio(call: Callable[[], Tensor], variant: Any, rounds: int, label: str) -> float:
    """Times the bare denoiser and a variant in turn, and returns the median of the rounds' ratios."""
    found: list[float] = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        call()
        base = time.perf_counter() - started
        with variant():
            if not number:
                call()  # what a run works out once
            started = time.perf_counter()
            call()
            taken = time.perf_counter() - started
        if number:
            found.append(taken / base)
    console.print(f"{label}: {statistics.median(found):.3f}")
    return statistics.median(found)


def seconds(action: Callable[[], Any]) -> float:
    """Seconds that an action takes, the best of three."""
    taken: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return min(taken)


def errors(unet: Any, sites: Sites, membranes: Sequence[Membrane]) -> float:
    """Largest error of a site against a float64 sum, over the error of the base layer alone."""
    worst = 0.0
    opening = Opening.of(torch.full((2, len(membranes)), 0.7), torch.ones(len(membranes)))
    injection = Injection(unet, sites, membranes, "bench")
    for name in list(sites.modules)[::24]:
        module = sites.modules[name]
        if not isinstance(module, nn.Linear):
            continue
        x = torch.randn(2, 64, module.in_features, generator=torch.Generator().manual_seed(3))
        bias = cast("Tensor | None", module.bias)  # None without a bias, whatever its annotation says
        exact = nn.functional.linear(x.double(), module.weight.double(), bias if bias is None else bias.double())
        with torch.no_grad():
            base = module(x)
            own = (base.double() - exact).abs().max()
            for membrane in membranes:
                factor = membrane.factors[file_key(name)]
                exact += 0.7 * (x.double() @ factor.down.double().T @ factor.up.double().T)
            found = injection.site(name).add(opening, x, base.clone())
        worst = max(worst, float((found.double() - exact).abs().max() / own))
    return worst


def full(rounds: int) -> tuple[dict[str, float], list[Floor]]:
    """Everything on the large U-Net."""
    unet = denoiser()
    sites = find_sites(unet, Transformer2DModel)
    membranes = random_membranes(sites, 128)
    call = caller(unet, 32, 768)
    base = call()
    peers: dict[str, float] = {}
    floors: list[Floor] = []
    with opened(unet, sites, membranes, 0.0):
        same = float(torch.equal(call(), base))
    floors.append(Floor.at_least("nothing open: bit-identical", same, 1.0))
    for count, size, limit in ((128, 0.0, 1.01), (1, 1.0, 1.02), (16, 1.0, 1.05), (128, 1.0, 1.10)):
        name = f"fp32, {count} applied, {'all' if size else 'none'} open"
        some = membranes[:count]
        value = ratio(call, partial(opened, unet, sites, some, size), rounds, name)
        floors.append(Floor.at_most(name, value, limit))
    for count in (1, 16):
        some = membranes[:count]
        peers[f"loop, fp32, {count}"] = ratio(call, partial(looped, sites, some), rounds, f"loop {count}")
    floors += switching(unet, sites, membranes)
    value = errors(unet, sites, membranes)
    floors.append(Floor.at_most("error against a float64 sum, over the base layer's own", value, 2.0))
    unet.to(torch.bfloat16)
    half = caller(unet, 32, 768)
    for count, limit in ((16, 1.06), (128, 1.10)):
        some = membranes[:count]
        name = f"bf16, {count} open"
        value = ratio(half, partial(opened, unet, sites, some, 1.0), rounds, name)
        floors.append(Floor.at_most(name, value, limit))
    peers["loop, bf16, 16"] = ratio(half, lambda: looped(sites, membranes[:16]), rounds, "loop bf16 16")
    return peers, floors


def switching(unet: Any, sites: Sites, membranes: Sequence[Membrane]) -> list[Floor]:
    """New permeabilities; applying and removing a policy's membranes, files included; memory."""
    injection = Injection(unet, sites, membranes, "bench")
    gamma, strengths = torch.rand(2, len(membranes)), torch.ones(len(membranes))
    x = torch.zeros(1)

    def new_gamma() -> None:
        opening = Opening.of(gamma, strengths)
        for name in injection.site_names:
            injection.site(name).prepare(opening, x)

    new_gamma()
    found = [Floor.at_most("new permeabilities for 128, s", seconds(new_gamma), 0.001)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in membranes for _, t in _factors(m)}
    for name in injection.site_names:
        for tensor in injection.site(name).tensors():
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    size = sum(t.numel() * t.element_size() for m in membranes for _, t in _factors(m))
    found.append(Floor.at_most("memory over the bytes of the open membranes", sum(held.values()) / size, 1.1))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{m.concept}.safetensors" for m in membranes]
        for membrane, path in zip(membranes, paths, strict=True):
            write_membrane(membrane, path)
        started = time.perf_counter()
        read = pool([read_membrane(path) for path in paths])
        applied = Injection(unet, sites, read, "bench")
        applied.attach(lambda _a, _k: Opening.of(gamma, strengths), lambda _: None)
        found.append(Floor.at_most("apply 128, files read and checked, s", time.perf_counter() - started, 1.5))
        started = time.perf_counter()
        applied.detach()
        found.append(Floor.at_most("remove 128, s", time.perf_counter() - started, 0.1))
    return found


def _factors(membrane: Membrane) -> Generator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in membrane.tensors() if not name.endswith("alpha"))


def dispatch_bound(rounds: int) -> tuple[dict[str, float], list[Floor]]:
    """A tiny U-Net, where the time goes into calling operators."""
    unet = denoiser(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    sites = find_sites(unet, Transformer2DModel)
    membranes = random_membranes(sites, 16)
    call = caller(unet, 8, 32)
    call()
    value = ratio(call, lambda: opened(unet, sites, membranes, 1.0), 10 * rounds, "tiny, 16 open")
    peer = ratio(call, lambda: looped(sites, membranes), 10 * rounds, "tiny, loop")
    return {"loop, tiny, 16": peer}, [Floor.at_most("dispatch-bound tiny U-Net, 16 open", value, 1.20)]


def main(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds per ratio.")] = 7,
    tiny: Annotated[bool, typer.Option(help="Only the tiny U-Net.")] = False,
) -> None:
    """Measures the membrane engine."""
    peers, floors = dispatch_bound(rounds)
    if not tiny:
        more_peers, more = full(rounds)
        peers, floors = peers | more_peers, floors + more
    report = {
        "model": "U-Net of Stable Diffusion 1.4's shape, random weights",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "peers": {name: round(value, 3) for name, value in peers.items()},
        "floors": [vars(floor) for floor in floors],
    }
    if as_json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return
    for floor in floors:
        console.print(f"{'holds ' if floor.holds else 'MISSED'} {floor.name}: {floor.value} (floor {floor.floor})")


if __name__ == "__main__":
    typer.run(main)
