"""`python -m benchmarks.plans`: what `raybooth plan` says of the real models, from their configurations alone."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from raybooth import config
from raybooth.planning import GIB, plan

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
}  # fmt: skip


def clip(width: int, layers: int, heads: int, projected: bool = False, activation: str = "quick_gelu") -> Any:
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            projection_dim=width if projected else 512, hidden_act=activation,
        )
    )  # fmt: skip


def sd14() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return {"unet": unet, "vae": diffusers.AutoencoderKL(**VAE, latent_channels=4, sample_size=512), "text_encoder": clip(768, 12, 12)}


def sdxl() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(**VAE, latent_channels=4, sample_size=1024)
    return {"unet": unet, "vae": vae, "text_encoder": clip(768, 12, 12), "text_encoder_2": clip(1280, 32, 20, True, "gelu")}


def sd35_medium() -> dict[str, Any]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
        pooled_projection_dim=2048, in_channels=16, out_channels=16, patch_size=2, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(**VAE, latent_channels=16, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False)
    return {
        "transformer": transformer, "vae": vae, "text_encoder": clip(768, 12, 12, True), "text_encoder_2": clip(1280, 32, 20, True, "gelu"),
        "text_encoder_3": t5_xxl(),
    }  # fmt: skip


def flux_dev() -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
        pooled_projection_dim=768, guidance_embeds=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(**VAE, latent_channels=16, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False)
    return {"transformer": transformer, "vae": vae, "text_encoder": clip(768, 12, 12), "text_encoder_2": t5_xxl()}


def t5_xxl() -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu")
    )


def written(make: Callable[[], dict[str, Any]], pipeline: str, scheduler: Any, folder: Path) -> Path:
    """Write the configuration files of a pipeline, without weights, to `folder`, and return it."""
    with torch.device("meta"):
        parts = make()
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", type(scheduler).__name__]}
    for name, part in parts.items():
        of_transformers = isinstance(part, transformers.PreTrainedModel)
        (part.config.save_pretrained if of_transformers else part.save_config)(folder / name)
        index[name] = ["transformers" if of_transformers else "diffusers", type(part).__name__]
        if name.startswith("text_encoder"):
            tokenizer = "T5Tokenizer" if isinstance(part, transformers.T5EncoderModel) else "CLIPTokenizer"
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", tokenizer]
    scheduler.save_config(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


MODELS: dict[str, tuple[Callable[[], dict[str, Any]], str, Any, int]] = {
    "SD 1.4": (sd14, "StableDiffusionPipeline", diffusers.DDIMScheduler(beta_schedule="scaled_linear"), 2),
    "SDXL": (sdxl, "StableDiffusionXLPipeline", diffusers.DDIMScheduler(beta_schedule="scaled_linear"), 1),
    "SD 3.5 medium": (sd35_medium, "StableDiffusion3Pipeline", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 1),
    "FLUX.1 [dev]": (flux_dev, "FluxPipeline", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), 1),
}
WAYS = {
    "all, with text encoders": [],
    "denoiser alone": ["finetune.text_encoder=false"],
    "denoiser alone, gradient checkpointing": ["finetune.text_encoder=false", "finetune.gradient_checkpointing=true"],
    "LoRA": ["finetune.text_encoder=false", "finetune.method=lora"],
    "LoRA, two passes a step": ["finetune.text_encoder=false", "finetune.method=lora", "finetune.accumulate=2"],
    "LoRA, gradient checkpointing": ["finetune.text_encoder=false", "finetune.method=lora", "finetune.gradient_checkpointing=true"],
}


def main() -> None:
    columns = ["model, pixels, batch", "trained", "parameters, M", "weights", "gradients", "optimizer", "activations and temporary"]
    columns += ["peak, GiB", "TFLOP a step", "drawing, GiB", "TFLOP a picture"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as scratch:
        for name, (make, pipeline, scheduler, batch) in MODELS.items():
            folder = written(make, pipeline, scheduler, Path(scratch) / name.replace(" ", "-"))
            for way, settings in WAYS.items():
                made = config.load(None, [f"finetune.batch={batch}", *settings], subject={"class": "dog"}, base={"model": str(folder)})
                planned = plan(folder, made)
                drawn = planned.class_pictures + planned.pictures
                parts = {k: v / GIB for k, v in planned.memory.items()}
                print(
                    f"| {name}, {resolution(folder)}, {batch} + {batch} | {way} | {planned.trained / 1e6:,.0f} "
                    f"| {parts['weights']:.1f} | {parts['gradients']:.1f} | {parts['optimizer']:.1f} | {parts['activations'] + parts['temporary']:.1f} "
                    f"| {planned.peak / GIB:.1f} | {planned.step_flops / 1e12:.1f} | {planned.drawing_peak / GIB:.1f} "
                    f"| {planned.drawing_flops / drawn / 1e12:.0f} |",
                    flush=True,
                )


def resolution(folder: Path) -> int:
    from raybooth.families import family_of

    return family_of(folder).facts(folder).resolution


if __name__ == "__main__":
    main()
