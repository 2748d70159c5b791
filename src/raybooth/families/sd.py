"""Stable Diffusion 1.x and 2.x: a UNet on KL latents, one CLIP text encoder, epsilon or velocity.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". mini is of this family too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.errors import RayboothError
from raybooth.families import parts, samplers
from raybooth.families.base import Facts, Family, Loaded

if TYPE_CHECKING:
    from torch import Tensor

    from raybooth.noise import Diffusion

_OTHER_NOISE = ("EDM", "FlowMatch")  # prefixes of scheduler classes that are not a DDPM's, as some finetunes have: read as one, they would be taught nonsense
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@parts.configured
def facts(folder: Path) -> Facts:
    scheduler, vae, unet = (parts.config(folder, name) for name in ("scheduler/scheduler_config", "vae/config", "unet/config"))
    prediction, process = scheduler.get("prediction_type", "epsilon"), scheduler.get("_class_name", "")
    if prediction not in ("epsilon", "v_prediction"):
        raise RayboothError(f"The model {folder} predicts '{prediction}': Stable Diffusion models of epsilon or v_prediction can be fine-tuned.")
    if process.startswith(_OTHER_NOISE) or vae.get("latents_mean"):
        what = f"noise as {process} has it" if process.startswith(_OTHER_NOISE) else "latents of another scale (latents_mean in vae/config.json)"
        raise RayboothError(f"The model {folder} is of {what}, which is not known: choose one that makes noise as Stable Diffusion does.")
    if unet.get("time_cond_proj_dim"):
        raise RayboothError(f"The UNet of {folder} was distilled to few steps (LCM), which are drawn in another way: choose the model that it was made from.")
    found = parts.facts(folder, "unet")
    if unet["in_channels"] != found.latent_channels:
        raise RayboothError(
            f"The UNet of {folder} takes {unet['in_channels']} channels and the VAE has {found.latent_channels}: it is made for something else, as inpainting "
            "models are; choose a model that draws from text."
        )
    return found


def objective(folder: Path) -> "Diffusion":
    from raybooth.noise import Diffusion

    scheduler = samplers.ddim(folder)
    return Diffusion(scheduler.alphas_cumprod, scheduler.config.prediction_type)


@parts.configured
def conditioning(folder: Path) -> dict[str, tuple[int, ...]]:
    return {"text": text_shape(folder, "text_encoder")}


def text_shape(folder: Path, *encoders: str) -> tuple[int, int]:
    """(tokens, width) of what these text encoders make together.

    Raises:
        RayboothError: if the UNet takes another width.
    """
    configs = [parts.config(folder, f"{name}/config") for name in encoders]
    width, taken = sum(c["hidden_size"] for c in configs), parts.config(folder, "unet/config")["cross_attention_dim"]
    if width != taken:
        raise RayboothError(
            f"The UNet of {folder} takes text of width {taken} and {' and '.join(encoders)} make {width}: they are not of one model, copy it again."
        )
    return configs[0]["max_position_embeddings"], width


def encode_text(loaded: Loaded, prompts: Sequence[str], known: "Mapping[str, Tensor] | None" = None) -> "dict[str, Tensor]":
    encoder = loaded.modules["text_encoder"]
    device = next(encoder.parameters()).device
    tokens, mask = (given.to(device, non_blocking=True) for given in _tokens(loaded, tuple(prompts)))
    # As StableDiffusionPipeline does: most encoders see the padding.
    return {"text": encoder(tokens, attention_mask=mask if getattr(encoder.config, "use_attention_mask", False) else None).last_hidden_state}


def _tokens(loaded: Loaded, prompts: tuple[str, ...]) -> "tuple[Tensor, Tensor]":
    """The prompts' tokens and the mask of their padding, each (n, length). The last ones are kept: a training step has the prompts of the one before."""
    last, tokens = loaded.kept.get("tokens", (None, None))
    if last != prompts:
        tokenizer = loaded.tokenizers["tokenizer"]
        read = tokenizer([*prompts], padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
        tokens = read.input_ids, read.attention_mask
        loaded.kept["tokens"] = prompts, tokens
    return tokens


def predict(loaded: Loaded, latents: "Tensor", t: "Tensor", conditioning: "Mapping[str, Tensor]") -> "Tensor":
    return loaded.modules["unet"](latents, t, conditioning["text"]).sample


FAMILY = Family(
    name="Stable Diffusion 1.x and 2.x",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    encoders=("text_encoder",),
    trainable_encoders=("text_encoder",),
    weights=("unet", "vae", "text_encoder"),
    settings=("tokenizer", "scheduler"),
    facts=facts,
    objective=objective,
    conditioning=conditioning,
    encode_text=encode_text,
    predict=predict,
    scheduler=samplers.scheduler,
    samplers=tuple(samplers.SAMPLERS),
    min_snr=True,
    guidance=7.5,
    half="float16",
    lora_targets=UNET_TARGETS,
)
