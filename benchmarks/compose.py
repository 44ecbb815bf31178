"""The membrane engine: what composing membranes costs and how exact it is, on a U-Net of Stable Diffusion 1.4's shape.

    python benchmarks/compose.py [--json] [--rounds 7] [--tiny | --smoke]

Random weights, two threads, 32x32 latents, two rows. Every ratio is the median over rounds of a time over that of the
bare U-Net in the same round. The peers run in the same rounds: PEFT's adapters, a loop over membranes, and the
single-adapter patch of SPM's released code, written anew from its equation, which several membranes share by adding up
their factors. PEFT stops at 16: adding 128 adapters takes it minutes. Exit code 1 if a floor is missed.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from floors import Floor, command, finish
from peft import LoraConfig
from rich.console import Console
from torch import Tensor, nn

from safegen.backend.injection import Injection, Opening
from safegen.backend.merging import renew
from safegen.backend.sites import Sites, file_key, find_sites
from safegen.membrane.delta import pool
from safegen.membrane.file import read_membrane, write_membrane
from safegen.membrane.weights import Factor, Membrane

console = Console(stderr=True)

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32, 32),
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


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


@dataclass(frozen=True)
class Caller:
    """A call of a denoiser on two fixed rows.

    Attributes:
        unet: The denoiser.
        size: Height and width of the latents.
        width: Width of the conditioning.
    """

    unet: Any
    size: int
    width: int

    def __call__(self) -> Tensor:
        """Runs it."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, self.size, self.size, generator=generator).to(self.unet.dtype)
        states = torch.randn(2, 77, self.width, generator=generator).to(self.unet.dtype)
        with torch.no_grad():
            return self.unet(x, torch.tensor(500), encoder_hidden_states=states).sample


Variant = Callable[[], AbstractContextManager[None]]


class Steady:
    """Membranes that are planned once, and attached for a while at a time; the opening is made once, as in a run."""

    def __init__(self, unet: Any, sites: Sites, membranes: Sequence[Membrane], gamma: Tensor | float) -> None:
        """Plans.

        Args:
            unet: The denoiser.
            sites: Its sites.
            membranes: What is attached.
            gamma: γ of each membrane, for both rows.
        """
        sizes = torch.as_tensor(gamma).expand(len(membranes))
        self._injection = Injection(unet, sites, membranes, "bench")
        self._opening = Opening.of(sizes.expand(2, -1), torch.ones(len(membranes)))

    @contextmanager
    def __call__(self) -> Generator[None]:
        """Attaches, and opens in every call."""
        self._injection.attach(lambda _a, _k: self._opening.again(measure=False), lambda _: None)
        try:
            yield
        finally:
            self._injection.detach()


class Static:
    """Membranes merged for every row."""

    def __init__(self, unet: Any, sites: Sites, membranes: Sequence[Membrane]) -> None:
        """Plans."""
        self._injection = Injection(unet, sites, membranes, "bench")
        self._sizes = torch.ones(len(membranes))

    @contextmanager
    def __call__(self) -> Generator[None]:
        """Merges and attaches; restores at the end."""
        self._injection.merge(self._sizes)
        opening = Opening.of(torch.zeros(2, 0), torch.zeros(0))
        self._injection.attach(lambda _a, _k: opening.again(measure=False), lambda _: None)
        try:
            yield
        finally:
            self._injection.detach()


def patched(sites: Sites, membranes: Sequence[Membrane], *, collapsed: bool) -> Variant:
    """The peers that replace a layer's `forward`.

    Args:
        sites: The sites.
        membranes: What is added.
        collapsed: Whether the factors are added up before the product, as in SPM's released code (one membrane: SPM
            Eq. 6; several: wrong, with the cost of one), or each membrane adds its own product in turn.
    """

    def joined(name: str) -> list[tuple[Tensor, Tensor]]:
        dtype = sites.modules[name].weight.dtype
        pairs = [(m.factors[file_key(name)].down.to(dtype), m.factors[file_key(name)].up.to(dtype)) for m in membranes]
        if not collapsed:
            return pairs
        return [(torch.stack([d for d, _ in pairs]).sum(0), torch.stack([u for _, u in pairs]).sum(0))]

    def patch(module: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        base, multiplier = module.forward, 1.0

        def forward(x: Tensor) -> Tensor:
            y = base(x)
            product = nn.functional.linear if isinstance(module, nn.Linear) else nn.functional.conv2d
            for down, up in pairs:
                y = y + product(product(x, down), up) * multiplier
            return y

        return forward

    found = {name: joined(name) for name in sites.modules}

    @contextmanager
    def variant() -> Generator[None]:
        for name, module in sites.modules.items():
            module.__dict__["forward"] = patch(module, found[name])
        try:
            yield
        finally:
            for module in sites.modules.values():
                del module.__dict__["forward"]

    return variant


class PeftPeer:
    """The peer that hosts use: PEFT adapters, on a twin that shares every weight with the bare denoiser."""

    def __init__(self, unet: Any, sites: Sites, membranes: Sequence[Membrane]) -> None:
        """Adds one adapter per membrane, with its factors."""
        self.twin: Any = copy.deepcopy(unet, {id(p): p for p in unet.parameters()})
        self.names = [membrane.concept for membrane in membranes]
        for membrane in membranes:
            config = LoraConfig(r=1, lora_alpha=1, target_modules=list(sites.modules), init_lora_weights=False)
            self.twin.add_adapter(config, adapter_name=membrane.concept)
            for name in sites.modules:
                layer, factor = self.twin.get_submodule(name), membrane.factors[file_key(name)]
                layer.lora_A[membrane.concept].weight.data.copy_(factor.down)
                layer.lora_B[membrane.concept].weight.data.copy_(factor.up)

    def call(self, call: Caller) -> Caller:
        """Returns the same call of the twin."""
        return replace(call, unet=self.twin)

    def with_active(self, count: int) -> Variant:
        """Returns a variant with so many adapters active."""

        @contextmanager
        def variant() -> Generator[None]:
            self.twin.set_adapters(self.names[:count], [1.0] * count)
            yield

        return variant


def ratios(
    call: Caller, variants: Mapping[str, Variant], rounds: int, others: Mapping[str, Caller] | None = None
) -> dict[str, float]:
    """Times the bare denoiser and every variant in turn, and returns the medians over rounds of the ratios.

    Args:
        call: A call of the denoiser.
        variants: What is timed beside the bare denoiser, each entered for its own call.
        rounds: How often; each begins with another variant. One more comes first, for what a run works out once.
        others: Calls of variants that run on another denoiser.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for number in range(rounds + 1):
        started = time.perf_counter()
        call()
        base = time.perf_counter() - started
        taken: dict[str, float] = {}
        for name in order:
            with variants[name]():
                run = (others or {}).get(name, call)
                if not number or isinstance(variants[name], Static):
                    run()
                started = time.perf_counter()
                run()
                taken[name] = time.perf_counter() - started
        started = time.perf_counter()
        call()
        base = (base + time.perf_counter() - started) / 2
        for name in order if number else ():
            found[name].append(taken[name] / base)
        order = [*order[1:], order[0]]
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        console.print(f"{name}: {value:.3f}")
    return medians


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
    linear = {name: module for name, module in sites.modules.items() if isinstance(module, nn.Linear)}
    for name in list(linear)[::23]:  # which is no multiple of a block's layers, so that all kinds have their turn
        module = linear[name]
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


def full(unet: Any, call: Caller, rounds: int) -> tuple[dict[str, float], list[Floor]]:
    """Everything on the large U-Net."""
    sites = find_sites(unet, Transformer2DModel)
    membranes = random_membranes(sites, 128)
    base = call()
    with Steady(unet, sites, membranes, 0.0)():
        same = float(torch.equal(call(), base))
    floors = [Floor.at_least("nothing open: bit-identical", same, 1.0)]
    peft = PeftPeer(unet, sites, membranes[:16])
    limits = {"fp32, 128 applied, none open": 1.01, "fp32, 1 open": 1.02, "fp32, 16 open": 1.05, "fp32, 128 open": 1.10}
    limits |= {"fp32, 1 static": 1.01, "fp32, 128 static": 1.01}
    variants: dict[str, Variant] = {
        "fp32, 128 applied, none open": Steady(unet, sites, membranes, 0.0),
        **{f"fp32, {n} open": Steady(unet, sites, membranes[:n], 1.0) for n in (1, 16, 128)},
        **{f"fp32, {n} static": Static(unet, sites, membranes[:n]) for n in (1, 128)},
        **{f"loop, fp32, {n}": patched(sites, membranes[:n], collapsed=False) for n in (1, 16)},
        **{f"SPM's single adapter, fp32, {n}": patched(sites, membranes[:n], collapsed=True) for n in (1, 16)},
        **{f"PEFT, fp32, {n}": peft.with_active(n) for n in (1, 16)},
    }
    found = ratios(call, variants, rounds, dict.fromkeys(("PEFT, fp32, 1", "PEFT, fp32, 16"), peft.call(call)))
    peers, more = switching(unet, sites, membranes)
    peers["PEFT: 16 other weights, s"] = seconds(lambda: peft.twin.set_adapters(peft.names, [0.5] * 16))
    floors += more
    value = errors(unet, sites, membranes)
    floors.append(Floor.at_most("error against a float64 sum, over the base layer's own", value, 2.0))
    for each in (unet, peft.twin):
        each.to(torch.bfloat16)
    limits |= {"bf16, 16 open": 1.06, "bf16, 128 open": 1.10, "bf16, 128 static": 1.01}
    variants = {
        **{f"bf16, {n} open": Steady(unet, sites, membranes[:n], 1.0) for n in (16, 128)},
        "bf16, 128 static": Static(unet, sites, membranes),
        "loop, bf16, 16": patched(sites, membranes[:16], collapsed=False),
        "SPM's single adapter, bf16, 16": patched(sites, membranes[:16], collapsed=True),
        "PEFT, bf16, 16": peft.with_active(16),
    }
    found |= ratios(call, variants, rounds, {"PEFT, bf16, 16": peft.call(call)})
    floors += [Floor.at_most(name, found.pop(name), limit) for name, limit in limits.items()]
    return peers | found, floors


def switching(unet: Any, sites: Sites, membranes: Sequence[Membrane]) -> tuple[dict[str, float], list[Floor]]:
    """New permeabilities; merging; applying and removing a policy's membranes, files included; memory."""
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
    found += merging(injection, strengths)
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
    rebuilt = seconds(lambda: patched(sites, membranes, collapsed=True))
    return {"SPM's single adapter: new permeabilities for 128, s": rebuilt}, found


def merging(injection: Injection, sizes: Tensor) -> list[Floor]:
    """Merging membranes and taking them out again; what looking for changed weights costs each image."""
    merge = seconds(lambda: injection.merge(sizes))
    started = time.perf_counter()
    sites = [injection.site(name) for name in injection.site_names]
    renew(sites, sizes)
    console.print(f"looking for changed weights, once an image: {time.perf_counter() - started:.3f} s")
    injection.attach(lambda _a, _k: Opening.of(torch.zeros(2, 0), torch.zeros(0)), lambda _: None)
    started = time.perf_counter()
    injection.detach()
    restore = time.perf_counter() - started
    return [Floor.at_most("merge 128, s", merge, 3.0), Floor.at_most("restore 128, s", restore, 0.5)]


def _factors(membrane: Membrane) -> Generator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in membrane.tensors() if not name.endswith("alpha"))


def dispatch_bound(rounds: int) -> tuple[dict[str, float], list[Floor]]:
    """A tiny U-Net, where the time goes into calling operators."""
    unet = denoiser(**SMALL)
    sites = find_sites(unet, Transformer2DModel)
    membranes = random_membranes(sites, 16)
    call = Caller(unet, 8, 32)
    peft = PeftPeer(unet, sites, membranes)
    apart = torch.linspace(0.25, 1.0, 16)
    limits = {f"dispatch-bound tiny U-Net, 16 open{how}": 1.20 for how in ("", " by different γ")}
    variants: dict[str, Variant] = {
        "dispatch-bound tiny U-Net, 16 open": Steady(unet, sites, membranes, 1.0),
        "dispatch-bound tiny U-Net, 16 open by different γ": Steady(unet, sites, membranes, apart),
        "none open, tiny, 16 applied": Steady(unet, sites, membranes, 0.0),
        "static, tiny, 16": Static(unet, sites, membranes),
        "loop, tiny, 16": patched(sites, membranes, collapsed=False),
        "SPM's single adapter, tiny, 16": patched(sites, membranes, collapsed=True),
        "PEFT, tiny, 16": peft.with_active(16),
    }
    found = ratios(call, variants, 10 * rounds, {"PEFT, tiny, 16": peft.call(call)})
    floors = [Floor.at_most(name, found.pop(name), limit) for name, limit in limits.items()]
    return found, floors


def main(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per ratio.")] = 7,
    tiny: Annotated[bool, typer.Option(help="Only the tiny U-Net.")] = False,
    smoke: Annotated[bool, typer.Option(help="A small U-Net in place of the large one: that all of it runs.")] = False,
) -> None:
    """Measures the membrane engine."""
    peers, floors = dispatch_bound(rounds)
    if not tiny:
        unet = denoiser(**SMALL) if smoke else denoiser()
        call = Caller(unet, 8, 32) if smoke else Caller(unet, 32, 768)
        more_peers, more = full(unet, call, rounds)
        peers, floors = peers | more_peers, floors + more
    report = {
        "benchmark": "The membrane engine",
        "command": command(__file__),
        "model": "U-Nets with random weights: small" if smoke or tiny else "U-Net of Stable Diffusion 1.4's shape",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "peers": {name: round(value, 4) for name, value in peers.items()},
    }
    finish(report, floors, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
