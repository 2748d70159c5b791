"""mini's networks, untrained: the component classes of Stable Diffusion 1.x at a size that two CPU cores can train."""

import json
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from raybooth.mini.pen import SIZE

MAX_TOKENS = 32
WIDTH = 128  # of the text tower, and so of the UNet's cross-attention


def make_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """CLIP's byte-pair encoding learnt from `captions`, over the full byte alphabet: any text has tokens, rare words several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=20, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in _merges(bpe)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merges(bpe: Tokenizer) -> list[list[str]]:
    return [m if isinstance(m, list) else m.split(" ") for m in json.loads(bpe.to_str())["model"]["merges"]]


def make_clip(vocab_size: int) -> CLIPModel:
    text = dict(
        vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vision = dict(
        hidden_size=160, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
        image_size=SIZE, patch_size=8, projection_dim=WIDTH,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=SIZE, mid_block_add_attention=False,
    )  # fmt: skip


def make_vit() -> ViTModel:
    """The ViT that tells identities apart by its [CLS] token, as DINO's ViT-S/16 does for real pictures."""
    config = ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, patch_size=8,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def make_unet() -> UNet2DConditionModel:
    """The UNet, with attention at 8x8 and 4x4 only: on a CPU it costs 40% of a step at 16x16 and adds little to pictures of one thing."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=4, out_channels=4, block_out_channels=(64, 128, 192), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16, cross_attention_dim=WIDTH, attention_head_dim=4,
    )  # fmt: skip


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas (Rombach et al. 2022): scaled linear, 0.00085 to 0.012, 1000 steps."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip


def zero_init(unet: UNet2DConditionModel) -> None:
    """Start every residual branch as nothing (Goyal et al. 2017; Dhariwal and Nichol 2021): faster early training."""
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "conv_out", "proj_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
