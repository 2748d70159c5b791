"""A Stable Diffusion of toy size, and photographs of it: enough to drive every line without waiting."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ["HF_ENDPOINT"] = os.environ.get("RAYBOOTH_TEST_ENDPOINT", "http://127.0.0.1:9")  # no test reaches the real hub

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from raybooth.mini import networks
from raybooth.mini.world import caption, random_scene, render, subject_scenes


def make_toy(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A random pipeline of 32-pixel pictures, about 300,000 parameters."""
    torch.manual_seed(0)
    tokenizer = networks.make_tokenizer(caption(random_scene(i)) for i in range(300))
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, projection_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        latent_channels=4, norm_num_groups=4, sample_size=32, mid_block_add_attention=False,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2,
    )  # fmt: skip
    scheduler = networks.make_scheduler()
    scheduler.register_to_config(prediction_type=prediction_type)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, scene in enumerate(subject_scenes(1, "dog", 3)):
        render(scene).save(folder / f"{i}.png")
    return folder
