"""LoRA files as other tools write them, made of given factors; and what to compare when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_sd
from torch import Tensor, nn

from safegen.backend.sites import file_key
from safegen.membrane.weights import Factor


def site_factors(modules: Mapping[str, nn.Linear | nn.Conv2d], seed: int, rank: int = 1) -> dict[str, Factor]:
    """Random factors for sites, by qualified name; every third has another rank, and each its own alpha."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Factor] = {}
    for k, (name, module) in enumerate(modules.items()):
        r = rank + (1 if k % 3 == 1 else 0)
        tail = [1, 1] if module.weight.ndim == 4 else []
        down = 0.3 * torch.randn(r, *module.weight.shape[1:], generator=generator)
        up = 0.3 * torch.randn(module.weight.shape[0], r, *tail, generator=generator)
        found[name] = Factor(down, up, 0.5 + k % 4)
    return found


def saved(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a safetensors file with the library itself."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, dict(metadata or {"prompts": "ghost"}))
    return path


def spm(factors: Mapping[str, Factor]) -> dict[str, Tensor]:
    """As the reference code of SPM and kohya's trainers."""
    tensors: dict[str, Tensor] = {}
    for name, f in factors.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": f.down, f"{key}.lora_up.weight": f.up, f"{key}.alpha": alpha(f)}
    return tensors


def peft(factors: Mapping[str, Factor], prefix: str = "unet.", *, alphas: bool = True) -> dict[str, Tensor]:
    """As PEFT and today's diffusers, with alpha tensors or none."""
    tensors: dict[str, Tensor] = {}
    for name, f in factors.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": f.down, f"{prefix}{name}.lora_B.weight": f.up}
        tensors |= {f"{prefix}{name}.alpha": alpha(f)} if alphas else {}
    return tensors


def old_processor(factors: Mapping[str, Factor], prefix: str = "unet.") -> dict[str, Tensor]:
    """As diffusers up to 0.16 named the attention's LoRA: below the processor."""
    tensors: dict[str, Tensor] = {}
    for name, f in factors.items():
        attention, projection = name.replace(".to_out.0", ".to_out").rsplit(".", 1)
        stem = f"{prefix}{attention}.processor.{projection}_lora"
        tensors |= {f"{stem}.down.weight": f.down, f"{stem}.up.weight": f.up, f"{stem}.down.weight.alpha": alpha(f)}
    return tensors


def old_layer(factors: Mapping[str, Factor], prefix: str = "unet.") -> dict[str, Tensor]:
    """As diffusers 0.17 to 0.21 named it: below the layer."""
    tensors: dict[str, Tensor] = {}
    for name, f in factors.items():
        stem = f"{prefix}{name}"
        tensors |= {f"{stem}.lora.down.weight": f.down, f"{stem}.lora.up.weight": f.up, f"{stem}.alpha": alpha(f)}
    return tensors


def numbered(denoiser: nn.Module, factors: Mapping[str, Factor], *classes: str) -> tuple[dict[str, Tensor], Any]:
    """As cloneofsimo's lora numbers the Linears below modules of some classes; scale 1, ranks in the metadata."""
    tensors: dict[str, Tensor] = {}
    metadata = {"unet": json.dumps(list(classes)), "prompts": "ghost"}
    for path, ancestor in denoiser.named_modules():
        if type(ancestor).__name__ not in classes:
            continue
        for name, module in ancestor.named_modules():
            if isinstance(module, nn.Linear):
                number, factor = len(tensors) // 2, factors[f"{path}.{name}"]
                tensors |= {f"unet:{number}:up": factor.up, f"unet:{number}:down": factor.down}
                metadata[f"unet:{number}:rank"] = str(factor.rank)
    return tensors, metadata


def alpha(factor: Factor) -> Tensor:
    return torch.tensor(factor.alpha)


def product(factor: Factor) -> Tensor:
    """scale · up · down, written out, in float64: [d_out, d_in·kh·kw]."""
    return factor.scale * factor.up.double().flatten(1) @ factor.down.double().flatten(1)


def same(found: Mapping[str, Factor], wanted: Mapping[str, Factor]) -> bool:
    """Whether factors are equal, bit for bit, site by site."""
    return found.keys() == wanted.keys() and all(
        f.alpha == wanted[key].alpha and torch.equal(f.down, wanted[key].down) and torch.equal(f.up, wanted[key].up)
        for key, f in found.items()
    )


def keyed(factors: Mapping[str, Factor]) -> dict[str, Factor]:
    """By file key, as a membrane has them."""
    return {file_key(name): factor for name, factor in factors.items()}


def lora_layers(pipe: Any) -> int:
    """How many modules of a U-Net diffusers has put a LoRA on."""
    return sum(hasattr(module, "lora_A") for module in pipe.unet.modules())


def merged(factors: Mapping[str, Factor]) -> Any:
    """The tiny pipeline with the products of factors, by qualified name, in its weights."""
    pipe = tiny_sd()
    for name, f in factors.items():
        weight = pipe.unet.get_submodule(name).weight
        delta = f.scale * f.up.double().flatten(1) @ f.down.double().flatten(1)
        weight.data += delta.reshape(weight.shape).float()
    return pipe
