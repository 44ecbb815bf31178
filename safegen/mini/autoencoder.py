"""Stage 1 of the recipe: the autoencoder, `diffusers.AutoencoderKL`, 64×64×3 to 16×16×4 and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from safegen.mini.loop import Ema, cosine, run_steps, set_learning_rate, to_model_range

LATENT_NOISE = 0.1  # added to latents in training: the decoder must forgive what a diffusion model leaves behind


def new_autoencoder() -> AutoencoderKL:
    """Returns an untrained autoencoder of safegen-mini's shape: factor 4, four latent channels."""
    shape: dict[str, Any] = dict(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    return AutoencoderKL(**shape)


def reconstruction_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Absolute error of pixels plus that of their horizontal and vertical differences (edges carry emoji art)."""
    loss = F.l1_loss(found, wanted) + F.mse_loss(found, wanted)
    for dim in (2, 3):
        loss = loss + F.l1_loss(found.diff(dim=dim), wanted.diff(dim=dim))
    return loss


def train_autoencoder(
    pictures: NDArray[np.uint8], checkpoint: Path, *, steps: int, batch: int = 32, rate: float = 1.5e-3
) -> AutoencoderKL:
    """Trains the autoencoder and whitens its latents.

    Args:
        pictures: [n, 64, 64, 3], uint8.
        checkpoint: Where to keep the state; training goes on from it where it exists.
        steps: Optimizer steps in all.
        batch: Pictures a step.
        rate: Highest learning rate.

    Returns:
        The averaged autoencoder, whose latents have mean 0 and deviation 1 per channel over `pictures`.
    """
    torch.manual_seed(0)
    vae = new_autoencoder().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=1e-4)
    ema = Ema(vae, 0.995)
    source = torch.from_numpy(pictures)

    def step(i: int) -> dict[str, float]:
        set_learning_rate(optimizer, rate * cosine(i, steps, warmup=100))
        images = to_model_range(source[torch.randint(len(source), (batch,))]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encode(images).latent_dist.mean
            decoded = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        decoded = decoded.float()
        size = latents.float().pow(2).mean()
        loss = reconstruction_loss(decoded, images) + 0.01 * (size - 1).relu()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.update(vae)
        mse = F.mse_loss(decoded.detach().clamp(-1, 1), images).item()
        return {"loss": loss.item(), "dB": 10 * np.log10(4 / mse), "latent²": size.item()}

    run_steps("autoencoder", steps, step, checkpoint=checkpoint, state={"vae": vae, "optimizer": optimizer, "ema": ema})
    vae.load_state_dict(ema.shadow)
    vae.eval()
    whiten(vae, source[torch.randperm(len(source))[:2048]])
    return vae


@torch.no_grad()
def encode(vae: Any, pictures: Tensor, *, batch: int = 64) -> Tensor:
    """Encodes uint8 pictures [n, 64, 64, 3] to latents [n, 4, 16, 16] (the mean of the posterior)."""
    parts = [vae.encode(to_model_range(part)).latent_dist.mean for part in pictures.split(batch)]
    return torch.cat(parts)


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Folds mean and deviation of the latent channels into the 1×1 convolutions around them, in place.

    The function that the autoencoder computes stays the same; its latents get mean 0 and deviation 1 per channel, so
    that `scaling_factor` is 1. The posterior's variance, unused in training, is set to nearly nothing, so that a
    sample equals the mean.
    """
    latents = encode(vae, pictures)
    mean = latents.mean(dim=(0, 2, 3))
    std = latents.std(dim=(0, 2, 3))
    quant: Any = vae.quant_conv
    post: Any = vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.weight[channels:] = 0.0
    quant.bias[channels:] = -20.0
    # post(z) = P z + b with z = std * z' + mean
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
