"""Stable Diffusion XL: two text encoders, and the size and crop of a picture as conditions (Podell et al. 2023)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.families import parts, samplers, sd
from raybooth.families.base import Family, Loaded
from raybooth.families.folder import read_index

if TYPE_CHECKING:
    from torch import Tensor


@parts.configured
def conditioning(folder: Path) -> dict[str, tuple[int, ...]]:
    pooled = parts.config(folder, "text_encoder_2/config")["projection_dim"]
    return {"text": sd.text_shape(folder, "text_encoder", "text_encoder_2"), "pooled": (pooled,)}


def encode_text(loaded: Loaded, prompts: Sequence[str], known: "Mapping[str, Tensor] | None" = None) -> "dict[str, Tensor]":
    """The conditioning: `text` (n, 77, both widths), `pooled` (n, width of the second encoder)."""
    import torch

    pipe = parts.text_pipeline(loaded, FAMILY.pipeline)
    device = next(loaded.modules["text_encoder"].parameters()).device
    text, _, pooled, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
    if not all(prompts) and read_index(loaded.folder).get("force_zeros_for_empty_prompt", True):  # none is, in training: no step waits for this
        said = torch.tensor([bool(p) for p in prompts], device=device)
        text, pooled = text * said[:, None, None], pooled * said[:, None]
    return {"text": text, "pooled": pooled}


def predict(loaded: Loaded, latents: "Tensor", t: "Tensor", conditioning: "Mapping[str, Tensor]") -> "Tensor":
    # Original size, corner of the crop, target size: uncropped, at the size that is drawn. Filled in on the device, so that no GPU is waited for.
    ids = latents.new_zeros(len(latents), 6)
    for i, side in enumerate(latents.shape[-2:]):
        ids[:, i::4] = side * loaded.facts.downscale
    added = {"text_embeds": conditioning["pooled"], "time_ids": ids}
    return loaded.modules["unet"](latents, t, conditioning["text"], added_cond_kwargs=added).sample


FAMILY = Family(
    name="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    encoders=("text_encoder", "text_encoder_2"),
    trainable_encoders=("text_encoder", "text_encoder_2"),
    weights=("unet", "vae", "text_encoder", "text_encoder_2"),
    settings=("tokenizer", "tokenizer_2", "scheduler"),
    facts=sd.facts,
    objective=sd.objective,
    conditioning=conditioning,
    encode_text=encode_text,
    predict=predict,
    scheduler=samplers.scheduler,
    samplers=tuple(samplers.SAMPLERS),
    min_snr=True,
    guidance=5.0,
    half="float16",
    lora_targets=sd.UNET_TARGETS,
)
