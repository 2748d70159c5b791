"""Stable Diffusion 1.x, 2.x and XL in one file, in the layout of the code they were published with.

diffusers reads that layout and does not write it. The names here are the inverse of its reader, which reads every file back before it is written.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils as reader
from torch import Tensor, nn

from raybooth.errors import RayboothError
from raybooth.families import parts
from raybooth.families.base import Family

State = Mapping[str, Tensor]
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"up_blocks\.(\d)\.resnets", r"up.\1.block"),
    (r"(down|up)_blocks\.(\d)\.\1samplers\.0", r"\1.\2.\1sample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])", r"\1"),
]  # fmt: skip
_UNET, _FIRST_STAGE = reader.LDM_UNET_KEY, reader.LDM_VAE_KEYS[0]


@dataclass(frozen=True)
class Lineage:
    """What sd-scripts and Stability's ModelSpec call the models that a model descends from, and what its denoiser predicts."""

    scripts: str
    spec: str
    prediction: str

    def header(self, title: str, phrase: str, side: int, lora: bool = False) -> dict[str, str]:
        """A header by ModelSpec 1.0.1, which model managers show, with the phrase that calls the subject."""
        values = {
            "sai_model_spec": "1.0.1",
            "architecture": f"{self.spec}/lora" if lora else self.spec,
            "implementation": "diffusers" if lora else "https://github.com/Stability-AI/generative-models",
            "title": title,
            "resolution": f"{side}x{side}",
            "trigger_phrase": phrase,
            "prediction_type": self.prediction,
        }
        return {f"modelspec.{k}": v for k, v in values.items()}


def lineage(family: Family, folder: Path, wanted: str) -> Lineage:
    """The lineage of a model folder.

    Raises:
        RayboothError: if this family has no such ancestors; `wanted` is what cannot be written then.
    """
    if family.denoiser != "unet":
        raise RayboothError(f"{wanted} is not written for {family.name}: use --to diffusers, or --to lora, which ComfyUI reads for this family.")
    velocity = parts.config(folder, "scheduler/scheduler_config").get("prediction_type") == "v_prediction"
    prediction = "v" if velocity else "epsilon"
    if len(family.encoders) > 1:
        return Lineage("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", prediction)
    if _is_openclip(parts.config(folder, "text_encoder/config")):
        return Lineage(*(("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512")), prediction)
    return Lineage("sd_v1_v" if velocity else "sd_v1", "stable-diffusion-v1", prediction)


def _is_openclip(config: Mapping[str, Any]) -> bool:
    """Whether a text encoder is an OpenCLIP: OpenAI's CLIP approximates GELU, OpenCLIP does not."""
    return config.get("hidden_act", "quick_gelu") != "quick_gelu"


def to_original(family: Family, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All weights by their original names.

    Raises:
        RayboothError: if the layout has no place for some of them, so that they would not be read back.
    """
    unet: Any = modules["unet"]
    vae: Any = modules["vae"]
    tensors = original_unet(unet.state_dict(), unet.config["layers_per_block"]) | _vae(vae.state_dict(), len(vae.config["up_block_types"]))
    _prove("unet", unet.state_dict(), reader.convert_ldm_unet_checkpoint(tensors, unet.config))
    _prove("vae", vae.state_dict(), reader.convert_ldm_vae_checkpoint(dict(tensors), vae.config))
    for i, part in enumerate(family.encoders):
        encoder: Any = modules[part]
        state = {f"text_model.{k}" if not k.startswith("text_") else k: t for k, t in encoder.state_dict().items()}
        outer = "cond_stage_model" if len(family.encoders) == 1 else f"conditioner.embedders.{i}"
        if _is_openclip(encoder.config.to_dict()):
            own = _openclip(state, f"{outer}.model.")
            back = reader.convert_open_clip_checkpoint(encoder, own, prefix=f"{outer}.model.")
        else:
            own = {f"{outer}.transformer.{k}": t for k, t in state.items()}
            back = reader.convert_ldm_clip_checkpoint(own)
        _prove(part, state, back)
        tensors |= own
    return {k: t.contiguous() for k, t in tensors.items()}


def marks(family: Family, folder: Path) -> dict[str, Tensor]:
    """Empty tensors by which ComfyUI tells an XL that predicts a velocity, and one with zero terminal SNR, from the usual one."""
    held = parts.config(folder, "scheduler/scheduler_config")
    velocity = held.get("prediction_type") == "v_prediction"
    if len(family.encoders) == 1 or not velocity:
        return {}
    return {name: torch.zeros(0) for name in ("v_pred", *(["ztsnr"] if held.get("rescale_betas_zero_snr") else []))}


def original_unet(state: State, layers: int) -> dict[str, Tensor]:
    """The UNet's tensors by their original names; `layers` is the number of layers in a block."""
    tables = reader.DIFFUSERS_TO_LDM_MAPPING["unet"]
    outer = tables["layers"] | tables["addition_embed_type"]
    crossed = {m[0] for k in state if (m := re.match(r"up_blocks\.\d+\.attentions", k))}

    def name(key: str) -> str:
        if key in outer:
            return outer[key]
        if key.startswith("mid_block."):
            _, kind, i, inner = key.split(".", 3)
            return f"middle_block.{2 * int(i)}.{_resnet(inner)}" if kind == "resnets" else f"middle_block.1.{inner}"
        if not (found := _BLOCK.fullmatch(key)):
            return key
        way, block, kind, inner = found[1], int(found[2]), found[3], found[5]
        first = block * (layers + 1) + (way == "down")
        blocks = "input_blocks" if way == "down" else "output_blocks"
        if kind == "downsamplers":
            return f"{blocks}.{first + layers}.0.{inner.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"{blocks}.{first + layers}.{2 if f'up_blocks.{block}.attentions' in crossed else 1}.{inner}"
        return f"{blocks}.{first + int(found[4])}.{f'0.{_resnet(inner)}' if kind == 'resnets' else f'1.{inner}'}"

    return {_UNET + name(k): t for k, t in state.items()}


def _resnet(inner: str) -> str:
    layer, _, rest = inner.partition(".")
    return f"{_RESNET.get(layer, layer)}.{rest}"


def _vae(state: State, levels: int) -> dict[str, Tensor]:
    outer = reader.DIFFUSERS_TO_LDM_MAPPING["vae"]

    def name(key: str) -> str:
        if key in outer:
            return outer[key]
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", key)  # counted from the other end
        for pattern, replacement in _VAE:
            key = re.sub(pattern, replacement, key)
        return key

    # The original attention is made of 1 x 1 convolutions.
    return {_FIRST_STAGE + name(k): t[:, :, None, None] if ".attentions." in k and t.ndim == 2 else t for k, t in state.items()}


def _openclip(state: State, prefix: str) -> dict[str, Tensor]:
    """A text encoder's tensors by OpenCLIP's names: queries, keys and values in one tensor, the projection transposed."""
    tables = reader.DIFFUSERS_TO_LDM_MAPPING["openclip"]
    tensors = {}
    for key, tensor in state.items():
        if key in tables["layers"]:
            tensors[prefix + tables["layers"][key]] = tensor.T if key.startswith("text_projection") else tensor
            continue
        if "_proj." in key and "out_proj" not in key:
            if "q_proj" not in key:
                continue
            tensor = torch.cat([state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            key = key.replace(".q_proj.", ".in_proj_")
        for new, old in tables["transformer"].items():
            key = key.replace(new, old)
        tensors[f"{prefix}transformer.{key}"] = tensor
    return tensors


def _prove(part: str, written: State, read: State) -> None:
    """Refuse (RayboothError) what diffusers does not read back to the bit."""
    lost = [k for k, t in written.items() if k not in read or not torch.equal(t, read[k])]
    if lost or read.keys() - written.keys():
        what = (lost or sorted(read.keys() - written.keys()))[0]
        raise RayboothError(f"The original layout of one file has no place for {what} of this model's {part}: use --to diffusers.")
