"""The families of the contract suite: how each is built and drawn with, and what is refused or missing, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import contract_images as images
import contract_more as more
import diffusers
import pytest
import torch
from contract_images import SEQUENCE, SIZE
from diffusers import LCMScheduler
from PIL import Image
from tiny import random_membrane
from torch import Tensor

from safegen.membrane.weights import Membrane


@dataclass(frozen=True, eq=False)
class Case:
    """One family of the suite.

    Attributes:
        name: Id, as a test's parameter.
        title: What people call it.
        build: Makes its tiny pipeline.
        sites: How many sites its denoiser has, counted by hand from the configuration.
        gate: What the gate scores.
        options: Arguments of its calls.
        unguided: Arguments that turn guidance off.
        guided: Arguments that make it read a negative prompt.
        refused: What is refused or missing, by feature, and why.
        further: Classes of diffusers that draw from an image with the same parts, by feature.
        image: Whether a call needs a picture to start from.
        out: Name of what a call returns.
    """

    name: str
    title: str
    build: Callable[[], Any]
    sites: int
    gate: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    guided: Mapping[str, Any] = field(default_factory=dict[str, Any])
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    further: Mapping[str, str] = field(default_factory=dict[str, str])
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
        # Some pipelines write into the lists that they are given.
        options = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
        options = {"num_inference_steps": steps, "output_type": "pt", "generator": generators} | options
        found: Any = pipe(prompt=list(prompts), **options)
        return torch.as_tensor(getattr(found, self.out) if self.out else found)

    def again(self, pipe: Any, kind: str = "") -> Any:
        """Another pipeline on the same parts."""
        other: Any = (getattr(diffusers, kind) if kind else type(pipe)).from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        for name in ("resolutions", "default_sample_size"):  # set by hand on tiny pipelines
            if hasattr(pipe, name):
                setattr(other, name, getattr(pipe, name))
        return other


def picture(size: int = 16) -> Image.Image:
    """A picture to start from."""
    return Image.new("RGB", (size, size), (200, 80, 40))


FLOW = "the trainer's noisy latents come from a schedule of variances, and this family has a flow"
HUNYUAN_TRAINING = "the trainer encodes for one text encoder"
NO_LOADER = "diffusers has no LoRA loader for this pipeline"
OWN_WORDS = (
    "prompt and negative prompt are encoded alike, so each is judged by its own words: a concept named in the negative "
    "prompt opens its membrane there"
)
MODULAR = "modular pipelines have other means for this, which the suite does not draw with"
NO_NEGATIVE = "the pipeline takes no negative prompt"
NO_PIPELINE = "diffusers has no such pipeline for this family"
REFERENCE = "the model reads the image as tokens of its own, which no gate understands: every membrane opens fully"
NO_CONTROLNET = "diffusers has no ControlNet pipeline for this family"
NOT_DRAWN = "not drawn in the suite; a call with a ControlNet's residuals opens every membrane fully"
NOT_FUSED = "diffusers fuses no projections of this transformer, and every site goes on being gated"
DUAL = "diffusers cannot draw with fused projections of a dual attention block"
MIXED_ROWS = (
    "for several images of several prompts diffusers orders the rows of states and of pooled vectors differently; each "
    "row opens for what it reads of both"
)

_PIXART: dict[str, Any] = SIZE | SEQUENCE | {"use_resolution_binning": False, "clean_caption": False}
_BOTH_CLIPS = "both CLIPs' penultimate states, each by itself"
_T5_MEAN = "the mean of T5's states over the tokens that are read"
_CHAT_MEAN = "the mean of the chat model's states over the tokens that are read"


def _only(**refused: str) -> dict[str, str]:
    return {name.replace("_", " "): why for name, why in refused.items()}


CASES: tuple[Case, ...] = (
    Case(
        "sd1",
        "Stable Diffusion 1.x",
        images.sd1,
        48,
        "CLIP's last hidden state",
        further={"img2img": "StableDiffusionImg2ImgPipeline", "inpaint": "StableDiffusionInpaintPipeline"},
    ),
    Case(
        "sd2",
        "Stable Diffusion 2.x (v-prediction)",
        images.sd2,
        48,
        "CLIP's last hidden state",
        further={"img2img": "StableDiffusionImg2ImgPipeline", "inpaint": "StableDiffusionInpaintPipeline"},
    ),
    Case(
        "sdxl",
        "Stable Diffusion XL",
        images.sdxl,
        48,
        _BOTH_CLIPS,
        SIZE,
        further={"img2img": "StableDiffusionXLImg2ImgPipeline", "inpaint": "StableDiffusionXLInpaintPipeline"},
    ),
    Case(
        "sdxl-lcm",
        "SDXL Turbo, LCM, Lightning",
        lambda: images.sdxl(LCMScheduler),
        48,
        _BOTH_CLIPS,
        SIZE | {"guidance_scale": 0.0},
        unguided={"guidance_scale": 0.0},
        refused={"negative prompts": "guidance is distilled: the pipeline reads no negative prompt"},
        further={"img2img": "StableDiffusionXLImg2ImgPipeline", "inpaint": "StableDiffusionXLInpaintPipeline"},
    ),
    Case(
        "sdxl-modular",
        "SDXL, modular pipeline",
        images.sdxl_modular,
        48,
        _BOTH_CLIPS,
        SIZE | {"output": "images"},
        unguided={},
        refused={
            "negative prompts": OWN_WORDS,
            "images per prompt": MIXED_ROWS,
            "from_pipe": MODULAR,
            "callbacks": MODULAR,
            "img2img": MODULAR,
            "inpaint": MODULAR,
            "ControlNet": MODULAR,
            "seeds": MODULAR,
        },
        out="",
    ),
    Case(
        "sdxl-refiner",
        "Stable Diffusion XL refiner",
        images.sdxl_refiner,
        48,
        "the second CLIP's penultimate states",
        further={"img2img": "StableDiffusionXLImg2ImgPipeline", "inpaint": "StableDiffusionXLInpaintPipeline"},
        refused={"ControlNet": NO_CONTROLNET},
        image=True,
    ),
    Case(
        "sd3",
        "Stable Diffusion 3, 3.5",
        images.sd3,
        29,
        _BOTH_CLIPS,
        SIZE | SEQUENCE,
        refused=_only(training=FLOW, fused_projections=DUAL),
        further={"img2img": "StableDiffusion3Img2ImgPipeline", "inpaint": "StableDiffusion3InpaintPipeline"},
    ),
    Case(
        "flux1",
        "FLUX.1 (dev, schnell)",
        images.flux,
        20,
        "CLIP's pooled output",
        SIZE | SEQUENCE,
        guided={"true_cfg_scale": 2.0},
        refused={"negative prompts": OWN_WORDS, "training": FLOW},
        further={"img2img": "FluxImg2ImgPipeline", "inpaint": "FluxInpaintPipeline"},
    ),
    Case(
        "flux2",
        "FLUX.2 (dev)",
        more.flux2,
        14,
        _CHAT_MEAN,
        SIZE,
        refused=_only(
            ControlNet=NO_CONTROLNET,
            training=FLOW,
            negative_prompts=NO_NEGATIVE,
            img2img=REFERENCE,
            inpaint=NO_PIPELINE,
        ),
    ),
    Case(
        "flux2-klein",
        "FLUX.2 Klein",
        more.flux2_klein,
        14,
        _CHAT_MEAN,
        SIZE,
        refused=_only(
            ControlNet=NO_CONTROLNET, training=FLOW, negative_prompts=NO_NEGATIVE, img2img=REFERENCE, inpaint=REFERENCE
        ),
    ),
    Case(
        "pixart-alpha",
        "PixArt-α",
        images.pixart_alpha,
        20,
        _T5_MEAN,
        _PIXART,
        refused=_only(ControlNet=NO_CONTROLNET, LoRA=NO_LOADER, img2img=NO_PIPELINE, inpaint=NO_PIPELINE),
    ),
    Case(
        "pixart-sigma",
        "PixArt-Σ",
        images.pixart,
        20,
        _T5_MEAN,
        _PIXART,
        refused=_only(ControlNet=NO_CONTROLNET, LoRA=NO_LOADER, img2img=NO_PIPELINE, inpaint=NO_PIPELINE),
    ),
    Case(
        "qwen-image",
        "Qwen-Image",
        more.qwen_image,
        14,
        _CHAT_MEAN,
        SIZE,
        unguided={},
        guided={"true_cfg_scale": 2.0},
        refused=_only(ControlNet=NOT_DRAWN, training=FLOW, negative_prompts=OWN_WORDS, fused_projections=NOT_FUSED),
        further={"img2img": "QwenImageImg2ImgPipeline", "inpaint": "QwenImageInpaintPipeline"},
    ),
    Case(
        "z-image",
        "Z-Image",
        more.z_image,
        23,
        _CHAT_MEAN,
        SIZE,
        unguided={"guidance_scale": 0.0},
        refused=_only(ControlNet=NOT_DRAWN, training=FLOW, fused_projections=NOT_FUSED),
        further={"img2img": "ZImageImg2ImgPipeline", "inpaint": "ZImageInpaintPipeline"},
    ),
    Case(
        "sana",
        "Sana",
        more.sana,
        10,
        "the mean of Gemma's states over the tokens that are read",
        {"height": 32, "width": 32, "use_resolution_binning": False, "clean_caption": False},
        refused=_only(
            ControlNet=NOT_DRAWN, training=FLOW, img2img=NO_PIPELINE, inpaint=NO_PIPELINE, fused_projections=NOT_FUSED
        ),
    ),
    Case(
        "auraflow",
        "AuraFlow",
        more.auraflow,
        24,
        _T5_MEAN,
        SIZE,
        refused=_only(ControlNet=NO_CONTROLNET, training=FLOW, img2img=NO_PIPELINE, inpaint=NO_PIPELINE),
    ),
    Case(
        "hunyuan-dit",
        "HunyuanDiT",
        more.hunyuan_dit,
        22,
        "the mean of the bilingual CLIP's states over the tokens that are read",
        {"height": 64, "width": 64, "use_resolution_binning": False},
        refused={
            "ControlNet": NOT_DRAWN,
            "training": HUNYUAN_TRAINING,
            "negative prompts": OWN_WORDS,
            "LoRA": NO_LOADER,
            "img2img": NO_PIPELINE,
            "inpaint": NO_PIPELINE,
        },
    ),
    Case(
        "kandinsky5",
        "Kandinsky 5 (images)",
        more.kandinsky5,
        18,
        "CLIP's pooled output",
        {"height": 64, "width": 64},
        refused={
            "ControlNet": NO_CONTROLNET,
            "training": FLOW,
            "negative prompts": OWN_WORDS,
            "images per prompt": MIXED_ROWS,
            "fused projections": NOT_FUSED,
            "img2img": NO_PIPELINE,
            "inpaint": NO_PIPELINE,
        },
        out="image",
    ),
    Case(
        "ltx",
        "LTX-Video",
        more.ltx,
        10,
        _T5_MEAN,
        {"height": 64, "width": 64, "num_frames": 9},
        refused=_only(
            ControlNet=NO_CONTROLNET,
            training=FLOW,
            img2img=NO_PIPELINE,
            inpaint=NO_PIPELINE,
            fused_projections=NOT_FUSED,
        ),
        out="frames",
    ),
    Case(
        "wan",
        "Wan 2.1",
        more.wan,
        10,
        _T5_MEAN,
        {"height": 16, "width": 16, "num_frames": 5},
        refused=_only(ControlNet=NO_CONTROLNET, training=FLOW, img2img=NO_PIPELINE, inpaint=NO_PIPELINE),
        out="frames",
    ),
)

GHOST, FOX = "a ghost", "a fox"
PROMPTS = [GHOST, FOX]  # the first opens the membrane fully, the second leaves it shut

FEATURES: dict[str, str] = {}
"""What the suite proves, by feature, in one sentence each; filled by `feature`, and the columns of docs/support.md."""


def feature(name: str, meaning: str) -> pytest.MarkDecorator:
    """Says that a test proves a feature, for the cases that do not refuse it."""
    FEATURES[name] = meaning
    chosen = [case for case in CASES if name not in case.refused]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def refusing(name: str, why: str) -> pytest.MarkDecorator:
    """Says that a test proves what becomes of a feature in the cases that refuse it for a reason."""
    chosen = [case for case in CASES if case.refused.get(name) == why]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@functools.cache
def shared(case: Case) -> Any:
    """The pipeline of a case, for tests that leave it as it was."""
    return case.build()


@functools.cache
def base_images(case: Case) -> Tensor:
    """What it draws for `PROMPTS`."""
    return case.draw(shared(case), PROMPTS)


@functools.cache
def membrane_for(case: Case) -> Membrane:
    """A membrane with random factors on every site, which words alone open."""
    return random_membrane(shared(case), floor=1.0)
