"""LoRA in the key layout of kohya's sd-scripts, which ComfyUI, AUTOMATIC1111 and Forge read."""

import json

from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor

from raybooth.families.base import Family
from raybooth.families.lowrank import LowRank
from raybooth.families.original import Lineage

_SIZES = {"lora_unet_add_embedding_linear_1": "lora_unet_label_emb_0_0", "lora_unet_add_embedding_linear_2": "lora_unet_label_emb_0_2"}
"""SDXL's embedding of sizes, which readers of this layout know by its original name only."""


def to_kohya(family: Family, low: LowRank) -> dict[str, Tensor]:
    """The tensors by kohya's names: `lora_unet_...`, text encoders as `lora_te_...`, or `lora_te1_...` and `lora_te2_...` where there are two.

    Each layer has `lora_down`, `lora_up` and `alpha`.
    """
    state = {f"{part}.{key}": tensor for part, tensors in low.tensors().items() for key, tensor in tensors.items()}
    return {_name(family, key): tensor.float() for key, tensor in convert_state_dict_to_kohya(state).items()}


def _name(family: Family, key: str) -> str:
    layer, _, rest = key.partition(".")
    layer = layer.replace("lora_te1_", "lora_te_") if len(family.encoders) == 1 else layer
    return f"{_SIZES.get(layer, layer)}.{rest}"


def header(line: Lineage, low: LowRank, name: str) -> dict[str, str]:
    """What sd-scripts writes in a file's header, without the settings of its training."""
    kernels = any(down.ndim == 4 and down.shape[-1] > 1 for layers in low.parts.values() for down, _ in layers.values())
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(low.rank),
        "ss_network_alpha": str(float(low.rank)),
        "ss_network_args": json.dumps({"conv_dim": str(low.rank), "conv_alpha": str(float(low.rank))} if kernels else {}),
        "ss_base_model_version": line.scripts,
        "ss_v2": str(line.scripts.startswith("sd_v2")),
        "ss_output_name": name,
    }
