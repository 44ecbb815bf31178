"""How long gating takes: scoring alone, and its share of a generation on a U-Net of SD v1.4's size."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from safegen import apply_policy
from safegen.audit import HmacKey
from safegen.backend import backend_of
from safegen.backend.base import Backend
from safegen.backend.sites import file_key
from safegen.membrane.file import write_membrane
from safegen.membrane.weights import Factor, Membrane
from safegen.policy.catalogue import load_catalogue
from safegen.text import PhraseMatcher
from safegen.transport.calibration import METADATA_KEY, Calibration, text_of
from safegen.transport.curve import Curve
from safegen.transport.transport import Gate, Target

PROMPTS, MEMBRANES = 32, 128
_KEY = HmacKey(b"a fixed key of the benchmark ...")
_TINY: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 768, "attention_head_dim": 4,
}  # fmt: skip
_SD14: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def pipeline(tokenizer: Any, *, whole: bool = False) -> Any:
    """Returns a Stable Diffusion pipeline with random weights: the text side has the shapes of CLIP ViT-L/14.

    Args:
        tokenizer: Its tokenizer, with a window of 77.
        whole: Whether U-Net and text tower have the size of SD v1.4's, too (860 and 123 million parameters).
    """
    torch.manual_seed(0)
    special: dict[str, Any] = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    layers = {"num_hidden_layers": 12 if whole else 1, "num_attention_heads": 12, "intermediate_size": 3072}
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=768, max_position_embeddings=77, **layers, **special)
    vae: dict[str, Any] = {
        "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
    }  # fmt: skip
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**vae), "text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(**(_SD14 if whole else _TINY)).eval(),
        "scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scoring(backend: Backend, prompts: Sequence[str]) -> dict[str, float]:
    """Times scoring of 32 encoded prompts for 128 membranes: direction and lexical, nothing kept from before.

    Returns:
        Median and slowest milliseconds of 20 rounds, each with other prompts.
    """
    concepts = [c for c in load_catalogue().concepts.values() if c.category in ("artist-style", "ip-character")]
    chosen = concepts[:MEMBRANES]
    owners = {phrase: k for k, concept in enumerate(chosen) for phrase in concept.phrases}
    matcher = PhraseMatcher(owners)

    def phrases(text: str) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for phrase in matcher.matches(text):
            found.setdefault(owners[phrase], []).append(phrase)
        return found

    targets = [Target((c.name, *c.aliases)[:3], {"direction": Curve(0.5, 0.8)}) for c in chosen]
    gate = Gate(backend, targets, phrases)
    times: list[float] = []
    for k in range(20):
        ids = backend.tokenise([prompts[(k * PROMPTS + i) % len(prompts)] for i in range(PROMPTS)])
        states, rows = backend.encode(ids), ids.tolist()
        started = time.perf_counter()
        gate.read(states, rows)
        times.append(1000 * (time.perf_counter() - started))
    return {"median ms": statistics.median(times), "slowest ms": max(times[1:]), "names": float(len(gate._owners))}


def _random_membranes(pipe: Any, folder: Path, count: int) -> list[str]:
    """Writes calibrated random membranes of rank 1 for the first artists of the catalogue; returns their concepts."""
    backend = backend_of(pipe)
    concepts = [c for c in load_catalogue().concepts.values() if c.category == "artist-style"][:count]
    curve = Calibration("direction", backend.fingerprint, 0.999, 1.0, 1.0, 0.0, 1, 1)
    factors = {
        file_key(name): Factor(
            torch.randn(1, *module.weight.shape[1:]),
            torch.randn(module.weight.shape[0], 1, *([1, 1] if module.weight.ndim == 4 else [])),
            1.0,
        )
        for name, module in backend.sites.modules.items()
    }
    for concept in concepts:
        metadata = {METADATA_KEY: text_of([curve])}
        membrane = Membrane(
            concept.id, (concept.name,), backend.family, backend.sites.architecture, factors, metadata=metadata
        )
        write_membrane(membrane, folder / backend.family / concept.id / "membrane.safetensors")
    return [concept.id for concept in concepts]


def share(tokenizer: Any, *, steps: int, membranes: int) -> dict[str, float]:
    """Times the gate within guided generations at 512x512 on a U-Net of SD v1.4's size with random weights.

    The steps of one generation cost the same, so `steps` of them are drawn, and 25 are reckoned with: the first call's
    gate (reading, deciding, writing the record), 24 later calls' checks, and 25 times the median step.

    Returns:
        Seconds a step, milliseconds of the gate at the first and at a later call, and the gate's share of 25 steps.
    """
    pipe = pipeline(tokenizer, whole=True)
    gated: list[float] = []
    stepped: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rules = "\n".join(
            f"  - {{id: {c}, concept: {c}, category: artist-style, on_missing: error}}"
            for c in _random_membranes(pipe, folder, membranes)
        )
        policy = folder / "policy.yaml"
        head = "apiVersion: safegen.dev/v1\nkind: Policy\nmetadata: {id: speed, version: 1.0.0}\nrules:\n"
        policy.write_text(head + rules + "\n")
        with apply_policy(pipe, policy, audit=folder / "audit", audit_key=_KEY, membranes=[folder]) as guard:
            before = guard._runs.before
            root: Any = pipe.unet.__dict__["forward"]

            def timed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                started = time.perf_counter()
                opening = before(args, kwargs)
                gated.append(time.perf_counter() - started)
                stepped.append(started)
                return opening

            root._before = timed
            pipe("a quiet street in the rain", num_inference_steps=steps, output_type="latent", guidance_scale=7.5)
    lengths = [b - a for a, b in zip(stepped, stepped[1:], strict=False)]
    step, first, later = statistics.median(lengths), gated[0], statistics.median(gated[1:])
    return {
        "membranes": float(membranes),
        "steps drawn": float(steps),
        "seconds a step": step,
        "gate ms, first call": 1000 * first,
        "gate ms, later calls": 1000 * later,
        "share of 25 steps": (first + 24 * later) / (25 * step),
    }
