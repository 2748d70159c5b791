"""LoRA files of any layout that diffusers reads, in and out: its own, kohya's, PEFT's."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from raybooth.errors import RayboothError
from raybooth.families.base import Family
from raybooth.families.lora import WEIGHTS
from raybooth.families.lowrank import LowRank, even, file_name, shapes
from raybooth.families.parts import config

if TYPE_CHECKING:
    from torch import Tensor

    from raybooth.families.lowrank import Pair

    State = dict[str, Tensor]

Shapes = dict[str, dict[str, tuple[int, ...]]]
PEFT = "base_model.model."
UPS = ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"))


def write(family: Family, low: LowRank, target: Path) -> None:
    """`pytorch_lora_weights.safetensors` in `target`, in diffusers' layout."""
    import diffusers
    from peft import LoraConfig

    layers: dict[str, Any] = {}
    for part, tensors in low.tensors().items():
        # PEFT takes the ends of names, so these fit with `text_model.` and without.
        names = [layer.removeprefix("text_model.") for layer in low.parts[part]]
        layers[f"{part}_lora_layers"] = tensors
        layers[f"{part}_lora_adapter_metadata"] = LoraConfig(r=low.rank, lora_alpha=low.rank, target_modules=sorted(names)).to_dict()
    getattr(diffusers, family.pipeline).save_lora_weights(target, weight_name=WEIGHTS, **layers)


def read(family: Family, base: Path, file: Path) -> LowRank:
    """A LoRA for the model in folder `base`, whoever made it, with alpha / rank multiplied into `up`.

    Raises:
        RayboothError: if it cannot be read, is not a plain LoRA, or does not fit the base.
    """
    tensors, header = _opened(file)
    if _magnitudes(tensors):
        raise RayboothError(f"The LoRA {file} is a DoRA, whose magnitudes diffusers does not read from every layout: only plain LoRAs can be taken over.")
    known = shapes(family, base)
    try:
        tensors, how = _of_a_part(family, known, file, tensors, json.loads(header.get("lora_adapter_metadata", "{}")))
        state = _in_diffusers_names(family, base, _scaled(tensors))
        peft = {part: _in_peft_names(part, state) for part in known}
        parts = {part: _pairs(part, own, how) for part, own in peft.items()}
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RayboothError(f"The LoRA {file} is of no layout that diffusers knows for {family.name} ({reason}).") from None
    _check(parts, known, base, file, len(state))
    return even(parts)


def is_dora(file: Path) -> bool:
    return _magnitudes(_opened(file)[0])


def _magnitudes(names: Iterable[str]) -> bool:
    return any("dora_scale" in k or "lora_magnitude_vector" in k for k in names)


def _opened(file: Path) -> "tuple[State, dict[str, str]]":
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not file.is_file():
        raise RayboothError(f"There is no LoRA file {file}: give the path of a .safetensors file.")
    try:
        with safe_open(file, "pt") as held:
            return load_file(file), held.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RayboothError(f"The LoRA {file} is not readable as safetensors ({error}): download it again; pickled ones are refused.") from None


def _of_a_part(family: Family, known: Shapes, file: Path, tensors: "State", how: dict[str, Any]) -> "tuple[State, dict[str, Any]]":
    """PEFT's own files do not say which part they are of: the one that has such layers. What is said of them lies beside them."""
    if not all(k.startswith(PEFT) for k in tensors):
        return tensors, how
    bare = {k.removeprefix(PEFT): t for k, t in tensors.items()}
    layer = min(bare).partition(".lora_")[0]
    part = next((p for p, layers in known.items() if file_name(p, layer) in layers), family.denoiser)
    beside = file.with_name("adapter_config.json")
    how = json.loads(beside.read_text()) if beside.exists() else {}
    return {f"{part}.{k}": t for k, t in bare.items()}, {f"{part}.{k}": v for k, v in how.items()}


def _scaled(tensors: "State") -> "State":
    """alpha / rank of each layer into its `up`: diffusers mistakes the names of those whose alpha is not the others'."""
    rest = {k: t for k, t in tensors.items() if not k.endswith(".alpha")}
    for key, alpha in tensors.items():
        layer = key.removesuffix(".alpha")
        for down, up in UPS if key.endswith(".alpha") else ():
            if layer + down in rest and layer + up in rest:
                rest[layer + up] = rest[layer + up] * (alpha.item() / rest[layer + down].shape[0])
    return rest


def _in_diffusers_names(family: Family, base: Path, tensors: "State") -> "State":
    import diffusers

    unet = {"unet_config": SimpleNamespace(**config(base, "unet/config"))} if family.denoiser == "unet" else {}
    state, *_ = getattr(diffusers, family.pipeline).lora_state_dict(dict(tensors), return_lora_metadata=True, **unet)
    return state


def _in_peft_names(part: str, state: "State") -> "State":
    """Of one part, by diffusers' converters, both its layouts for text encoders one after the other: its guess fails where only some layers are adapted."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    own = {k.removeprefix(f"{part}."): t for k, t in state.items() if k.startswith(f"{part}.")}
    if not own or any(".lora_A." in k for k in own):
        return own
    if not part.startswith("text_encoder"):
        return convert_unet_state_dict_to_peft(own)
    return convert_state_dict_to_peft(convert_state_dict_to_peft(own, StateDictType.DIFFUSERS_OLD), StateDictType.DIFFUSERS)


def _pairs(part: str, own: "State", how: dict[str, Any]) -> "dict[str, Pair]":
    """Scaled as what is said of them says."""
    how = {k.removeprefix(f"{part}."): v for k, v in how.items() if k.startswith(f"{part}.")}
    downs = {k.removesuffix(".lora_A.weight"): t for k, t in own.items() if k.endswith(".lora_A.weight")}
    return {file_name(part, k): (down.float(), own[f"{k}.lora_B.weight"].float() * _scale(how, k, down.shape[0])) for k, down in downs.items()}


def _scale(how: dict[str, Any], layer: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    if "lora_alpha" not in how:
        return 1.0
    patterns: dict[str, float] = how.get("alpha_pattern") or {}
    alpha: float = patterns.get(get_pattern_key(list(patterns), layer), how["lora_alpha"])
    return alpha / (rank**0.5 if how.get("use_rslora") else rank)


def _check(parts: "dict[str, dict[str, Pair]]", known: Shapes, base: Path, file: Path, tensors: int) -> None:
    def refused(why: str) -> RayboothError:
        return RayboothError(f"The LoRA {file} does not fit the model {base} ({why}): give the base it was made for with --base.")

    for part, layers in parts.items():
        for layer, (down, up) in layers.items():
            if layer not in known[part]:
                raise refused(f"it changes {part}.{layer}, which the model does not have")
            own, wanted = (up.shape[0], *down.shape[1:]), known[part][layer]
            if own != wanted or up.shape[1] != down.shape[0]:
                raise refused(f"its {part}.{layer} is for a weight of {own}, the model's is {wanted}")
    used = 2 * sum(map(len, parts.values()))
    if not used or used != tensors:
        raise refused(f"{tensors - used} of its {tensors} tensors are no low-rank updates of layers of this model")
