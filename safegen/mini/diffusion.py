"""Stage 3 of the recipe: the U-Net and the text tower, trained together on latents of captioned pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from safegen.mini import captions
from safegen.mini.art import draw, scene_boxes, steady_box
from safegen.mini.autoencoder import encode
from safegen.mini.catalogue import OBJECTS, STYLE_NAMES, STYLES, is_held_out
from safegen.mini.loop import Ema, run_steps, set_learning_rate, trapezoid

TEXT_WIDTH = 192
SCENE_SHARE = 0.1
BARE_SHARE = 0.3
STYLE_ALONE_SHARE = 0.05
UNCONDITIONAL_SHARE = 0.1
MIN_SNR = 5.0


@dataclass(frozen=True, slots=True)
class Latents:
    """Encoded training pictures.

    Attributes:
        singles: [variants, objects, styles, 4, 16, 16].
        scenes: [n, 4, 16, 16].
        scene_parts: [n, 3]: left object, right object, style.
    """

    singles: Tensor
    scenes: Tensor
    scene_parts: Tensor


def encode_pictures(
    vae: AutoencoderKL, sprites: NDArray[np.uint8], path: Path, *, variants: int, scenes: int
) -> Latents:
    """Draws and encodes the training pictures, or reads them from `path` where they were encoded before.

    Held-out object×style pairs are encoded too, in `singles` only; `train_diffusion` never reads them.
    """
    if path.is_file():
        return Latents(**torch.load(path, weights_only=True))
    rng = np.random.default_rng(1)
    count = len(OBJECTS)
    singles = torch.empty(variants, count, len(STYLES), 4, 16, 16)
    for variant in range(variants):
        pictures = [
            draw([sprites[i, j]], [steady_box(rng)], name) for i in range(count) for j, name in enumerate(STYLE_NAMES)
        ]
        singles[variant] = encode(vae, torch.from_numpy(np.stack(pictures))).view(count, len(STYLES), 4, 16, 16)
    parts: list[tuple[int, int, int]] = []
    pictures = []
    while len(parts) < scenes:
        left, right = (int(i) for i in rng.choice(count, size=2, replace=False))
        style = int(rng.integers(len(STYLES)))
        if is_held_out(left, style) or is_held_out(right, style):
            continue
        parts.append((left, right, style))
        pictures.append(draw([sprites[left, style], sprites[right, style]], scene_boxes(rng), STYLE_NAMES[style]))
    found = Latents(singles, encode(vae, torch.from_numpy(np.stack(pictures))), torch.tensor(parts))
    content = {"singles": found.singles, "scenes": found.scenes, "scene_parts": found.scene_parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return found


def new_unet() -> UNet2DConditionModel:
    """Returns an untrained U-Net of safegen-mini's shape: 8.7 M parameters, cross-attention at 8×8 and 4×4."""
    shape: dict[str, Any] = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 5),
        norm_num_groups=16,
    )
    return UNet2DConditionModel(**shape)


def new_text_tower(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns an untrained CLIP text model: two layers, width 192."""
    special: dict[str, Any] = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    }
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=captions.MAX_TOKENS,
            hidden_act="quick_gelu",
            **special,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """Returns the sampler, with Stable Diffusion 1's noise schedule and epsilon prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


class Sampler:
    """Draws captioned latents: single objects with or without a style, styles alone, scenes, and empty captions."""

    def __init__(self, latents: Latents) -> None:
        self._latents = latents
        kept = [(i, j) for i in range(len(OBJECTS)) for j in range(len(STYLES)) if not is_held_out(i, j)]
        self._pairs = np.array(kept)

    def _single(self, rng: np.random.Generator) -> tuple[Tensor, str]:
        i, j = self._pairs[int(rng.integers(len(self._pairs)))]
        picture = self._latents.singles[int(rng.integers(len(self._latents.singles))), i, j]
        kind = rng.random()
        if kind < BARE_SHARE:
            return picture, captions.bare(OBJECTS[i], rng)
        if kind < BARE_SHARE + STYLE_ALONE_SHARE:
            return picture, captions.style_alone(STYLES[j], rng)
        return picture, captions.styled(OBJECTS[i], STYLES[j], rng)

    def _scene(self, rng: np.random.Generator) -> tuple[Tensor, str]:
        k = int(rng.integers(len(self._latents.scenes)))
        left, right, style = (int(v) for v in self._latents.scene_parts[k])
        return self._latents.scenes[k], captions.scene(OBJECTS[left], OBJECTS[right], STYLES[style], rng)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Returns latents [size, 4, 16, 16] and their captions."""
        rows = [self._scene(rng) if rng.random() < SCENE_SHARE else self._single(rng) for _ in range(size)]
        texts = ["" if rng.random() < UNCONDITIONAL_SHARE else text for _, text in rows]
        return torch.stack([picture for picture, _ in rows]), texts


def tokenise(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Returns token ids [n, 32], padded and cut as the Stable Diffusion pipeline does."""
    return tokenizer(
        list(texts), padding="max_length", max_length=captions.MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


class _Denoiser(nn.Module):
    """U-Net and text tower as one module, so that their gradients are averaged together."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predicts the noise in x_t [n, 4, 16, 16] at timesteps t [n] for token ids [n, 32]."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.unet(x_t, t, self.text(ids).last_hidden_state).sample.float()


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the diffusion stage.

    Attributes:
        steps: Optimizer steps in all.
        workers: Processes, one core each; on two cores two of them are 1.5 times as fast as one with two threads.
        batch: Captioned latents a step, over all processes.
        rate: Highest learning rate.
    """

    steps: int
    workers: int = 2
    batch: int = 48
    rate: float = 8e-4


def _worker(rank: int, settings: Settings, latents: Latents, tokenizer: CLIPTokenizer, checkpoint: Path) -> None:
    """Runs one process of the data-parallel training; process 0 shows, averages and saves."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = checkpoint.with_suffix(".store")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store.absolute()}", rank=rank, world_size=settings.workers
    )
    torch.manual_seed(0)
    unet = new_unet().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    text = new_text_tower(tokenizer)
    both = nn.ModuleDict({"unet": unet, "text": text})
    optimizer = torch.optim.AdamW(both.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = Ema(both, 0.999)
    model = nn.parallel.DistributedDataParallel(_Denoiser(unet, text))
    alphas = new_scheduler().alphas_cumprod
    sampler = Sampler(latents)
    size = settings.batch // settings.workers

    def step(i: int) -> dict[str, float]:
        rng = np.random.default_rng([7, i, rank])  # by step, so that a resumed run sees the same batches
        noise = torch.Generator().manual_seed(i * settings.workers + rank)
        set_learning_rate(optimizer, settings.rate * trapezoid(i, settings.steps, warmup=200))
        x0, texts = sampler.batch(size, rng)
        t = torch.randint(0, 1000, (size,), generator=noise)
        eps = torch.randn(x0.shape, generator=noise)
        a = alphas[t].view(-1, 1, 1, 1)
        found = model(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, tokenise(tokenizer, texts))
        weight = (MIN_SNR * (1 - alphas[t]) / alphas[t]).clamp(max=1.0)  # min(SNR, 5) / SNR, arXiv 2303.09556
        loss = ((found - eps).pow(2).mean(dim=(1, 2, 3)) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        if rank == 0:
            ema.update(both)
        return {"loss": loss.item()}

    state: dict[str, Any] = {"both": both, "optimizer": optimizer, "ema": ema}
    run_steps("diffusion", settings.steps, step, checkpoint=checkpoint, state=state, lead=rank == 0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_diffusion(
    latents: Latents, tokenizer: CLIPTokenizer, checkpoint: Path, settings: Settings
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Trains U-Net and text tower to predict the noise in latents (epsilon); goes on from the checkpoint.

    Returns:
        The averaged U-Net and text tower.
    """
    checkpoint.with_suffix(".store").unlink(missing_ok=True)
    torch.multiprocessing.spawn(
        _worker, args=(settings, latents, tokenizer, checkpoint), nprocs=settings.workers, join=True
    )
    both = nn.ModuleDict({"unet": new_unet(), "text": new_text_tower(tokenizer)})
    both.load_state_dict(torch.load(checkpoint, weights_only=True)["ema"]["shadow"])
    both.eval()
    unet: Any = both["unet"]
    text: Any = both["text"]
    return unet, text


def assemble(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Puts the parts together as a stock Stable Diffusion pipeline."""
    parts: dict[str, Any] = dict(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
    )
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)
