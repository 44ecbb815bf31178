"""Tiny pipelines of the image families that came first: U-Nets, SD3, FLUX.1, PixArt."""

from __future__ import annotations

from typing import Any

import torch
from contract_parts import TOKENS, clip, flow, made, t5, vae
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from tiny import tiny_sd

_UNET: dict[str, Any] = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
    norm_num_groups=4,
    use_linear_projection=True,
)


def sd1() -> Any:
    return tiny_sd()


def sd2() -> Any:
    """Stable Diffusion 2.x: linear projections, and v-prediction."""
    pipe = tiny_sd(use_linear_projection=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def _sdxl_unet(width: int, sizes: int) -> Any:
    shape: dict[str, Any] = _UNET | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "cross_attention_dim": width,
    }
    return UNet2DConditionModel(**shape, projection_class_embeddings_input_dim=24 + 4 * sizes).eval()


def sdxl(scheduler: Any = EulerDiscreteScheduler) -> Any:
    torch.manual_seed(0)
    first, tokenizer = clip(16)
    second, tokenizer_2 = clip(24, project=24, pad="!")
    return made(
        StableDiffusionXLPipeline,
        unet=_sdxl_unet(40, 6),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        vae=vae(),
        scheduler=scheduler(),
        add_watermarker=False,
    )


def sdxl_modular() -> Any:
    """The same parts in a modular pipeline, whose guider calls the denoiser once for each branch."""
    parts = sdxl().components
    pipe: Any = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe._component_specs})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_refiner() -> Any:
    torch.manual_seed(0)
    second, tokenizer_2 = clip(24, project=24, pad="!")
    return made(
        StableDiffusionXLImg2ImgPipeline,
        unet=_sdxl_unet(24, 5),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        vae=vae(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
        requires_aesthetics_score=True,
    )


def sd3(*, with_t5: bool = True) -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    first, tokenizer = clip(16, project=16)
    second, tokenizer_2 = clip(24, project=24, pad="!")
    third, tokenizer_3 = t5(48) if with_t5 else (None, None)
    return made(
        StableDiffusion3Pipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=vae(16, shift_factor=0.1, scaling_factor=1.5),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
    )


def flux_parts(*, guided: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guided,
    ).eval()
    first, tokenizer = clip(16)
    second, tokenizer_2 = t5(32)
    return dict(
        transformer=transformer,
        scheduler=flow(),
        vae=vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
    )


def flux(*, guided: bool = True) -> Any:
    pipe = made(FluxPipeline, **flux_parts(guided=guided))
    pipe.default_sample_size = 8
    return pipe


def pixart(kind: Any = PixArtSigmaPipeline) -> Any:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=32,
        use_additional_conditions=False,
    ).eval()
    encoder, tokenizer = t5(32)
    return made(
        kind,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def pixart_alpha() -> Any:
    return pixart(PixArtAlphaPipeline)


SIZE: dict[str, Any] = {"height": 16, "width": 16}
SEQUENCE: dict[str, Any] = {"max_sequence_length": TOKENS}
