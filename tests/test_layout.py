"""Stable Diffusion 1.4's layout: its exact configuration files, channels of UNet and VAE halved for memory, random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from raybooth.mini.networks import make_tokenizer

UNET = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
    "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4,
    "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 512,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
SCHEDULER = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def sd14(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = make_tokenizer(["photo of a dog"])
    vocabulary = small.get_vocab() | {f"<unused{i}>": len(small) + i for i in range(49408 - len(small))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    halved = [c // 2 for c in UNET["block_out_channels"]]  # type: ignore[attr-defined]
    folder = tmp_path_factory.mktemp("sd14") / "model"
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET | {"block_out_channels": halved}),
        vae=AutoencoderKL(**VAE | {"block_out_channels": [c // 2 for c in VAE["block_out_channels"]]}),  # type: ignore[attr-defined]
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=tokenizer, scheduler=PNDMScheduler(**SCHEDULER), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_all_stages_on_stable_diffusions_own_layout(sd14: Path, photos: Path, tmp_path: Path):
    """At 128 pixels, a quarter of the model's own side, which changes no line of code and saves minutes."""
    settings = {
        "base.resolution": 128, "prior.images": 2, "prior.steps": 2, "finetune.steps": 2, "finetune.batch": 1, "finetune.log_every": 1,
        "generate.prompts": ["photo of {subject}"], "generate.images_per_prompt": 1, "generate.steps": 2, "cluster.sample_batch": 2,
    }  # fmt: skip
    command = [sys.executable, "-m", "raybooth", "run", "--photos", str(photos), "--class", "dog", "--base", str(sd14), "--storage", str(tmp_path)]
    command += [part for k, v in settings.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "fine-tuned-model" / "manifest.json").read_text())["facts"]
    assert all(0 < row["loss"] < 100 for row in facts["history"])
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "fine-tuned-model")
    assert type(pipe.scheduler) is PNDMScheduler
    assert len(list((tmp_path / "output-images").glob("photo-of-*.png"))) == 1
