"""Stable Diffusion 3 and 3.5: a transformer on rectified flow, three text encoders (Esser et al. 2024)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.errors import RayboothError
from raybooth.families import parts
from raybooth.families.base import Facts, Family, Loaded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raybooth.noise import Flow

T5_LENGTH = 256  # tokens
POSITIONS = 96  # patches along a side, where the configuration does not say


@parts.configured
def facts(folder: Path) -> Facts:
    """What the configuration says; the table of positions bounds the size of a picture."""
    _shift(parts.config(folder, "scheduler/scheduler_config"))
    found, positions = parts.facts(folder, "transformer"), parts.config(folder, "transformer/config").get("pos_embed_max_size", POSITIONS)
    return replace(found, largest=positions * found.multiple, text_length=T5_LENGTH)


def objective(folder: Path) -> "Flow":
    from raybooth.noise import Flow

    config = parts.config(folder, "scheduler/scheduler_config")
    return Flow(1.0 if config.get("use_dynamic_shifting") else _shift(config))


def _shift(config: Mapping[str, Any]) -> float:
    return float(config.get("shift", 1.0))


@parts.configured
def conditioning(folder: Path) -> dict[str, tuple[int, ...]]:
    net = parts.config(folder, "transformer/config")
    clip = parts.config(folder, "text_encoder/config")["max_position_embeddings"]
    return {"text": (clip + T5_LENGTH, net["joint_attention_dim"]), "pooled": (net["pooled_projection_dim"],)}


def encode_text(loaded: Loaded, prompts: Sequence[str], known: "Mapping[str, Tensor] | None" = None) -> "dict[str, Tensor]":
    """The conditioning: `text` (n, 77 + 256, T5's width), the CLIPs' tokens and then T5's; `pooled` (n, both CLIP widths)."""
    import torch

    pipe, texts = parts.text_pipeline(loaded, FAMILY.pipeline), list(prompts)
    device = next(loaded.modules["text_encoder"].parameters()).device
    words, pooled = zip(*(pipe._get_clip_prompt_embeds(texts, device=device, clip_model_index=i) for i in range(2)), strict=True)
    long = known["text"][:, -T5_LENGTH:] if known else pipe._get_t5_prompt_embeds(texts, device=device)
    short = torch.cat(words, -1)
    short = torch.nn.functional.pad(short, (0, long.shape[-1] - short.shape[-1]))
    return {"text": torch.cat([short, long], -2), "pooled": torch.cat(pooled, -1)}


def predict(loaded: Loaded, latents: "Tensor", t: "Tensor", conditioning: "Mapping[str, Tensor]") -> "Tensor":
    net = loaded.modules["transformer"]
    return net(latents, timestep=t, encoder_hidden_states=conditioning["text"], pooled_projections=conditioning["pooled"]).sample


def scheduler(folder: Path, name: str, steps: int, shape: tuple[int, int, int], device: "torch.device") -> Any:
    """A scheduler along the flow: Euler, with which these models were published, or DPM-Solver++."""
    return flow_scheduler(folder, name, steps, device, shape[1] * shape[2] // 4, max_shift=1.16)


def flow_scheduler(folder: Path, name: str, steps: int, device: "torch.device", patches: int, max_shift: float, **how: Any) -> Any:
    """A scheduler whose sigmas are shifted towards noise; with dynamic shifting in the configuration, the further the larger the picture.

    Args:
        patches: the number of a picture's patches.
        max_shift: of dynamic shifting, where the configuration does not say; as in diffusers' pipelines.
        how: passed on to Euler's set_timesteps.

    Raises:
        RayboothError: if the sampler is not one for flows.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config, mu = parts.config(folder, "scheduler/scheduler_config"), None
    if config.get("use_dynamic_shifting"):
        usual = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
        mu = calculate_shift(patches, *(config.get(key, value) for key, value in usual.items()))
    if name == "euler":
        made = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        made.set_timesteps(steps, device=device, mu=mu, **how)
    elif name == "dpmsolver++":
        made = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=_shift(config) if mu is None else math.exp(mu))
        made.set_timesteps(steps, device=device)
        made.set_begin_index(0)  # looked up by its whole timestep, which two of hundreds of steps may share, it would be the second
    else:
        raise RayboothError(f"The sampler '{name}' is not one for flow-matching models such as {folder}: choose euler or dpmsolver++.")
    return made


FAMILY = Family(
    name="Stable Diffusion 3 and 3.5",
    pipeline="StableDiffusion3Pipeline",
    denoiser="transformer",
    encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    trainable_encoders=("text_encoder", "text_encoder_2"),
    weights=("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    settings=("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"),
    facts=facts,
    objective=objective,
    conditioning=conditioning,
    encode_text=encode_text,
    predict=predict,
    scheduler=scheduler,
    samplers=("euler", "dpmsolver++"),
    min_snr=False,
    guidance=7.0,
    half="bfloat16",
    lora_targets=(
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ),
)  # fmt: skip
