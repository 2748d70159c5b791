"""FLUX.1: a transformer on rectified flow over 2 x 2 patches of latents, CLIP and T5, and guidance as an input."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.families import parts
from raybooth.families.base import Facts, Family, Loaded
from raybooth.families.sd3 import FAMILY as SD3
from raybooth.families.sd3 import flow_scheduler, objective

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RESOLUTION = 1024  # its configuration does not say


@parts.configured
def facts(folder: Path) -> Facts:
    vae = parts.config(folder, "vae/config")
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    side, length = min(RESOLUTION, vae.get("sample_size", RESOLUTION)), _text_length(folder)
    return Facts(side, vae["latent_channels"], downscale, patch=2, embeds_guidance=True, text_length=length)


def _text_length(folder: Path) -> int:
    """T5's tokens as the models were trained: 512 for [dev], 256 for [schnell]. Padding is not masked, so it makes a difference."""
    return 512 if parts.config(folder, "transformer/config").get("guidance_embeds", False) else 256


@parts.configured
def conditioning(folder: Path) -> dict[str, tuple[int, ...]]:
    net = parts.config(folder, "transformer/config")
    return {"text": (_text_length(folder), net["joint_attention_dim"]), "pooled": (net["pooled_projection_dim"],)}


def encode_text(loaded: Loaded, prompts: Sequence[str], known: "Mapping[str, Tensor] | None" = None) -> "dict[str, Tensor]":
    """The conditioning: `text` (n, 512 or 256, T5's width), `pooled` (n, CLIP's width)."""
    pipe, texts = parts.text_pipeline(loaded, FAMILY.pipeline), list(prompts)
    device = next(loaded.modules["text_encoder"].parameters()).device
    text = known["text"] if known else pipe._get_t5_prompt_embeds(texts, max_sequence_length=loaded.facts.text_length, device=device)
    return {"text": text, "pooled": pipe._get_clip_prompt_embeds(texts, device=device)}


def predict(loaded: Loaded, latents: "Tensor", t: "Tensor", conditioning: "Mapping[str, Tensor]") -> "Tensor":
    """The denoiser's output at the `guidance` (n,) of `conditioning`, or at 1, as in training. FLUX.1 [schnell] takes none, and no second pass either."""
    import torch
    from diffusers import FluxPipeline

    net: Any = loaded.modules["transformer"]
    n, c, h, w = latents.shape
    packed = FluxPipeline._pack_latents(latents, n, c, h, w)
    places = FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, latents.device, latents.dtype)
    words = torch.zeros(conditioning["text"].shape[1], 3, device=latents.device, dtype=latents.dtype)
    guidance = conditioning.get("guidance", torch.ones(n, device=latents.device)) if net.config.guidance_embeds else None
    out = net(
        packed, encoder_hidden_states=conditioning["text"], pooled_projections=conditioning["pooled"], timestep=t / 1000,
        img_ids=places, txt_ids=words, guidance=guidance,
    ).sample  # fmt: skip
    return FluxPipeline._unpack_latents(out, h, w, 1)


def scheduler(folder: Path, name: str, steps: int, shape: tuple[int, int, int], device: "torch.device") -> Any:
    import numpy as np

    return flow_scheduler(folder, name, steps, device, shape[1] * shape[2] // 4, max_shift=1.15, sigmas=np.linspace(1.0, 1 / steps, steps))


FAMILY = Family(
    name="FLUX.1",
    pipeline="FluxPipeline",
    denoiser="transformer",
    encoders=("text_encoder", "text_encoder_2"),
    trainable_encoders=("text_encoder",),
    weights=("transformer", "vae", "text_encoder", "text_encoder_2"),
    settings=("tokenizer", "tokenizer_2", "scheduler"),
    facts=facts,
    objective=objective,
    conditioning=conditioning,
    encode_text=encode_text,
    predict=predict,
    scheduler=scheduler,
    samplers=SD3.samplers,
    min_snr=False,
    guidance=3.5,
    half="bfloat16",
    lora_targets=SD3.lora_targets,
)
