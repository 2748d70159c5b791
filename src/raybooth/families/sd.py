"""Stable Diffusion 1.x and 2.x: a UNet on KL latents, one CLIP text encoder, epsilon or velocity.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". mini is of this family too.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.errors import RayboothError
from raybooth.families.base import Facts, Family, Loaded
from raybooth.families.folder import INDEX, read_index

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from raybooth.noise import Diffusion

_PREDICTIONS = ("epsilon", "v_prediction")
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
}


def detect(index: dict[str, Any]) -> bool:
    return index.get("_class_name") == "StableDiffusionPipeline"


def facts(folder: Path) -> Facts:
    unet, vae = _config(folder, "unet/config"), _config(folder, "vae/config")
    prediction = _config(folder, "scheduler/scheduler_config").get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise RayboothError(f"The model {folder} predicts '{prediction}': Stable Diffusion models of epsilon or v_prediction can be fine-tuned.")
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    return Facts(unet["sample_size"] * downscale, unet["in_channels"], downscale)


def diffusion(folder: Path) -> "Diffusion":
    from raybooth.noise import Diffusion

    scheduler = _ddim(folder)
    return Diffusion(scheduler.alphas_cumprod, scheduler.config.prediction_type)


def _ddim(folder: Path) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(folder / "scheduler")


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RayboothError(f"The model's {path} cannot be read ({error}): copy or download the model again.") from None


def load(folder: Path, parts: Sequence[str], dtype: "torch.dtype | None" = None) -> Loaded:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    dtype = dtype or torch.float32
    modules: dict[str, nn.Module] = {}
    for part in parts:
        kind = kinds[part]
        dtype_argument = {"dtype": dtype} if kind is CLIPTextModel else {"torch_dtype": dtype}
        modules[part] = kind.from_pretrained(folder / part, use_safetensors=True, **dtype_argument).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer") if "text_encoder" in parts else None
    return Loaded(folder, modules, tokenizer)


def encode_text(loaded: Loaded, prompts: Sequence[str]) -> "Tensor":
    tokenizer, encoder = loaded.tokenizer, loaded.modules["text_encoder"]
    tokens = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
    return encoder(tokens.to(next(encoder.parameters()).device)).last_hidden_state


def encode_image(loaded: Loaded, pixels: "Tensor") -> "tuple[Tensor, Tensor]":
    vae: Any = loaded.modules["vae"]
    posterior = vae.encode(pixels).latent_dist
    scale = vae.config.scaling_factor
    return posterior.mean * scale, posterior.std * scale


def decode(loaded: Loaded, latents: "Tensor") -> "Tensor":
    vae: Any = loaded.modules["vae"]
    return vae.decode(latents / vae.config.scaling_factor).sample


def predict(unet: "nn.Module", latents: "Tensor", t: "Tensor", conditioning: "Tensor") -> "Tensor":
    return unet(latents, t, conditioning).sample


def trainable(text_encoder: bool) -> tuple[str, ...]:
    return ("unet", "text_encoder") if text_encoder else ("unet",)


def scheduler(folder: Path, name: str) -> Any:
    """Deterministic samplers only: a picture depends on its initial latents and on nothing drawn on the way."""
    import diffusers

    kind, extra = _SAMPLERS[name]
    return getattr(diffusers, kind).from_config(_ddim(folder).config, **extra)


def save(base: Path, trained: Mapping[str, Any], target: Path) -> None:
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if part in trained:
            trained[part].save_pretrained(target / part)
            _forget_origin(target / part / "config.json")
        else:
            shutil.copytree(base / part, target / part, dirs_exist_ok=True)
    # No safety checker: its weights are no part of what was fine-tuned, nor of what was fetched.
    index = read_index(base) | {"requires_safety_checker": False}
    index |= {k: [None, None] for k in ("safety_checker", "feature_extractor", "image_encoder") if k in index}
    index.pop("_name_or_path", None)
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _forget_origin(config: Path) -> None:
    """The folder it was loaded from is nobody's business, and would make equal results differ."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")


FAMILY = Family(
    name="Stable Diffusion 1.x and 2.x",
    weights=("unet", "vae", "text_encoder"),
    settings=("tokenizer", "scheduler"),
    detect=detect,
    facts=facts,
    diffusion=diffusion,
    load=load,
    encode_text=encode_text,
    encode_image=encode_image,
    decode=decode,
    predict=predict,
    trainable=trainable,
    scheduler=scheduler,
    save=save,
)
