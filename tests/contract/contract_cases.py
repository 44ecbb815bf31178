"""The families of the contract suite: how each is built, drawn with, and what it supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import contract_images as images
import contract_more as more
import torch
from contract_images import SEQUENCE, SIZE
from diffusers import LCMScheduler
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """One family of the suite.

    Attributes:
        name: Id, as a test's parameter.
        title: What people call it.
        build: Makes its tiny pipeline.
        sites: How many sites its denoiser has, counted by hand from the configuration.
        options: Arguments of its calls.
        gate: What the gate reads.
        unguided: Arguments that turn guidance off; None where the family has no such switch.
        refused: What is refused or missing, by feature, and why.
        image: Whether a call needs a picture to start from.
        out: Name of what a call returns.
    """

    name: str
    title: str
    build: Callable[[], Any]
    sites: int
    gate: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    unguided: Mapping[str, Any] | None = field(default_factory=lambda: {"guidance_scale": 1.0})
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    image: bool = False
    out: str = "images"

    def draw(self, pipe: Any, prompts: list[str], *, steps: int = 2, images: int = 1, **changes: Any) -> Tensor:
        """Draws with fixed seeds; returns what the pipeline drew, [n, …]."""
        count = len(prompts) * images
        generators = [torch.Generator().manual_seed(k) for k in range(count)]
        options: dict[str, Any] = dict(self.options) | changes
        if images > 1:
            options["num_videos_per_prompt" if self.out == "frames" else "num_images_per_prompt"] = images
        if self.image:
            options |= {"image": picture(), "strength": 1.0}
        options = {"num_inference_steps": steps, "output_type": "pt", "generator": generators} | options
        found: Any = pipe(prompt=list(prompts), **options)  # some pipelines write into the list
        return torch.as_tensor(getattr(found, self.out))


def picture() -> Image.Image:
    """A picture to start from."""
    return Image.new("RGB", (16, 16), (200, 80, 40))


FLOW = "the trainer draws its noisy latents from a schedule of variances, and this family has a flow"
NO_LOADER = "diffusers has no LoRA loader for this pipeline"
OWN_WORDS = (
    "prompt and negative prompt are encoded alike: a concept named in the negative prompt opens its membrane there"
)

_PIXART: dict[str, Any] = SIZE | SEQUENCE | {"use_resolution_binning": False, "clean_caption": False}
_BOTH_CLIPS = "both CLIPs' penultimate states, each by itself"
_CHAT_MEAN = "the mean of the chat model's states over the tokens that are read"
_T5_MEAN = "the mean of T5's states over the tokens that are read"

CASES: tuple[Case, ...] = (
    Case("sd1", "Stable Diffusion 1.x", images.sd1, 48, "CLIP's last hidden state"),
    Case("sd2", "Stable Diffusion 2.x (v-prediction)", images.sd2, 48, "CLIP's last hidden state"),
    Case("sdxl", "Stable Diffusion XL", images.sdxl, 48, _BOTH_CLIPS, SIZE),
    Case(
        "sdxl-lcm",
        "SDXL Turbo, LCM, Lightning",
        lambda: images.sdxl(LCMScheduler),
        48,
        _BOTH_CLIPS,
        SIZE | {"guidance_scale": 0.0},
        refused={"negative prompts": "guidance is distilled: the pipeline reads no negative prompt"},
    ),
    Case("sdxl-refiner", "Stable Diffusion XL refiner", images.sdxl_refiner, 48, "the second CLIP's states", image=True),
    Case("sd3", "Stable Diffusion 3, 3.5", images.sd3, 29, _BOTH_CLIPS, SIZE | SEQUENCE, refused={"training": FLOW}),
    Case(
        "flux1",
        "FLUX.1 (dev, schnell)",
        images.flux,
        20,
        "CLIP's pooled output",
        SIZE | SEQUENCE,
        unguided={"guidance_scale": 0.0},
        refused={"negative prompts": OWN_WORDS, "training": FLOW},
    ),
    Case("pixart-alpha", "PixArt-α", images.pixart_alpha, 20, _T5_MEAN, _PIXART, refused={"LoRA": NO_LOADER}),
    Case("pixart-sigma", "PixArt-Σ", images.pixart, 20, _T5_MEAN, _PIXART, refused={"LoRA": NO_LOADER}),
    Case("flux2", "FLUX.2 (dev)", more.flux2, 14, _CHAT_MEAN, SIZE, refused={"training": FLOW}),
    Case("flux2-klein", "FLUX.2 Klein", more.flux2_klein, 14, _CHAT_MEAN, SIZE, refused={"training": FLOW}),
    Case("qwen-image", "Qwen-Image", more.qwen_image, 14, _CHAT_MEAN, SIZE, refused={"training": FLOW}),
    Case("z-image", "Z-Image", more.z_image, 23, _CHAT_MEAN, SIZE, refused={"training": FLOW}),
    Case("sana", "Sana", more.sana, 10, "the mean of Gemma's states over the tokens that are read", {"height": 32, "width": 32, "use_resolution_binning": False}, refused={"training": FLOW}),
    Case("auraflow", "AuraFlow", more.auraflow, 24, _T5_MEAN, SIZE, refused={"training": FLOW}),
    Case("hunyuan-dit", "HunyuanDiT", more.hunyuan_dit, 22, "", {"height": 64, "width": 64, "use_resolution_binning": False}, refused={"training": FLOW}),
    Case("kandinsky5", "Kandinsky 5", more.kandinsky5, 18, "CLIP's pooled output", {"height": 64, "width": 64}, refused={"training": FLOW}, out="image"),
    Case("ltx", "LTX-Video", more.ltx, 10, _T5_MEAN, {"height": 64, "width": 64, "num_frames": 9}, refused={"training": FLOW}, out="frames"),
    Case("wan", "Wan 2.1", more.wan, 10, _T5_MEAN, {"height": 16, "width": 16, "num_frames": 5}, refused={"training": FLOW}, out="frames"),
)
