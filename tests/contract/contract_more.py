"""Tiny pipelines of the families with chat models or T5 alone, and of the video families."""

from __future__ import annotations

from typing import Any

import torch
from contract_parts import chat_tokenizer, clip, flow, gemma_tokenizer, made, t5, vae
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDPMScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny import WORDS
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

_LM: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}


def sana() -> Any:
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    encoder = Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), num_hidden_layers=1, **_LM)).eval()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    ).eval()
    sizes: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
    }
    autoencoder = AutoencoderDC(latent_channels=4, attention_head_dim=2, **sizes).eval()
    return made(
        SanaPipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def auraflow() -> Any:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    ).eval()
    encoder, tokenizer = t5(16, UMT5EncoderModel, UMT5Config)
    return made(
        AuraFlowPipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def _qwen_vl(size: int) -> Any:
    text = _LM | {
        "vocab_size": size,
        "num_hidden_layers": 1,
        "rope_scaling": {"mrope_section": [1, 1, 2], "type": "mrope"},
    }
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": 16,
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def qwen_image() -> Any:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    pipe = made(
        QwenImagePipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=autoencoder,
        text_encoder=_qwen_vl(len(tokenizer)),
        tokenizer=tokenizer,
    )
    pipe.default_sample_size = 8
    return pipe


def z_image() -> Any:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    encoder = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=2, **_LM)).eval()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[512, 64, 64],
    ).eval()
    for name in ("x_pad_token", "cap_pad_token"):  # left empty by the class
        torch.nn.init.normal_(getattr(transformer, name))
    return made(
        ZImagePipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def hunyuan_dit() -> Any:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    content: dict[str, Any] = {"vocab": {word: k for k, word in enumerate(words)}}
    tokenizer = BertTokenizer(**content, model_max_length=77)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=len(words), intermediate_size=16, **sizes)).eval()
    encoder, tokenizer_2 = t5(24)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        mlp_ratio=1.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=24,
        pooled_projection_dim=8,
    ).eval()
    return made(
        HunyuanDiTPipeline,
        transformer=transformer,
        scheduler=DDPMScheduler(prediction_type="v_prediction"),
        vae=vae(blocks=4),
        text_encoder=bert,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer_2,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def kandinsky5() -> Any:
    torch.manual_seed(0)
    chat = chat_tokenizer()
    second, tokenizer_2 = clip(16, tokens=77)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
    ).eval()
    pipe = made(
        Kandinsky5T2IPipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=vae(blocks=4),
        text_encoder=_qwen_vl(len(chat)),
        tokenizer=chat,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
    )
    pipe.resolutions = [(64, 64)]
    return pipe


def _flux2(guided: bool) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guided,
    ).eval()
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    return {"transformer": transformer, "scheduler": flow(), "vae": autoencoder}


def flux2() -> Any:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(left=True)
    text = _LM | {"model_type": "mistral", "vocab_size": len(tokenizer), "num_hidden_layers": 30}
    vision: dict[str, Any] = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()
    pipe = made(Flux2Pipeline, **_flux2(guided=True), text_encoder=encoder, tokenizer=tokenizer)
    pipe.default_sample_size = 8
    return pipe


def flux2_klein() -> Any:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=27, **_LM)).eval()
    pipe = made(Flux2KleinPipeline, **_flux2(guided=False), text_encoder=encoder, tokenizer=tokenizer)
    pipe.default_sample_size = 8
    return pipe


def ltx() -> Any:
    torch.manual_seed(0)
    encoder, tokenizer = t5(32)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    ).eval()
    blocks: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    }
    autoencoder = AutoencoderKLLTXVideo(latent_channels=8, **blocks).eval()
    return made(
        LTXPipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def wan() -> Any:
    torch.manual_seed(0)
    encoder, tokenizer = t5(16, UMT5EncoderModel, UMT5Config)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
    ).eval()
    autoencoder = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()
    return made(
        WanPipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
