"""Random models of every family at toy size, made from configurations, saved as diffusers would."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from raybooth.mini import networks
from raybooth.mini.world import caption, random_scene


def tokenizer() -> CLIPTokenizer:
    return networks.make_tokenizer(caption(random_scene(i)) for i in range(300))


def clip_text(vocab: int, projected: bool = False, width: int = 32, **more: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, projection_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1, **more,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz")]
    words = T5TokenizerFast(vocab=letters, extra_ids=0)
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2)), words


def vae(channels: int = 4, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        latent_channels=channels, norm_num_groups=4, sample_size=32, **{"mid_block_add_attention": False, **more},
    )  # fmt: skip


def unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, **more,
    )  # fmt: skip


def make_sd(folder: Path, prediction_type: str = "epsilon", act: str = "quick_gelu") -> Path:
    """About 300,000 parameters, pictures of 32 pixels."""
    torch.manual_seed(0)
    words, scheduler = tokenizer(), networks.make_scheduler()
    scheduler.register_to_config(prediction_type=prediction_type)
    StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_text(len(words), hidden_act=act), tokenizer=words, unet=unet(cross_attention_dim=32), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_sd2(folder: Path) -> Path:
    """Velocity, and OpenCLIP's text encoder."""
    return make_sd(folder, "v_prediction", "gelu")


def make_sdxl(folder: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    added = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32)
    StableDiffusionXLPipeline(
        vae=vae(mid_block_add_attention=True), tokenizer=words, tokenizer_2=words,
        text_encoder=clip_text(len(words)), text_encoder_2=clip_text(len(words), projected=True, width=48, hidden_act="gelu"),
        unet=unet(cross_attention_dim=80, **added),
        scheduler=EulerDiscreteScheduler.from_config(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").config),
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_sd3(folder: Path, **more: Any) -> Path:
    torch.manual_seed(0)
    words, (long, long_words) = tokenizer(), t5(64)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64, pos_embed_max_size=32, qk_norm="rms_norm", **more,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_text(len(words), projected=True), tokenizer=words, text_encoder_2=clip_text(len(words), projected=True), tokenizer_2=words,
        text_encoder_3=long, tokenizer_3=long_words,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_sd35(folder: Path) -> Path:
    """As 3.5 medium is laid out: its first blocks have a second attention, to the picture alone."""
    return make_sd3(folder, dual_attention_layers=(0,))


def make_flux(folder: Path, guidance: bool = True) -> Path:
    torch.manual_seed(0)
    words, (long, long_words) = tokenizer(), t5(32)
    FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=clip_text(len(words)), tokenizer=words, text_encoder_2=long, tokenizer_2=long_words,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_schnell(folder: Path) -> Path:
    """Without guidance as an input."""
    return make_flux(folder, guidance=False)


MAKERS = {"sd1": make_sd, "sd2": make_sd2, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}
LAYOUTS = {"sd3.5": make_sd35, "schnell": make_schnell}
"""Of the same families, where tests of a family's own code differ."""


@functools.cache
def made(name: str) -> Path:
    """That model, once for all tests, which change nothing in it."""
    return (MAKERS | LAYOUTS)[name](Path(_MADE.name) / name)


_MADE = tempfile.TemporaryDirectory(prefix="raybooth-toys-")
