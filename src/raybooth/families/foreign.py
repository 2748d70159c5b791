"""LoRA files in any layout that diffusers reads (its own, kohya's, PEFT's), and written in its own."""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.errors import RayboothError, reason
from raybooth.families.base import Family, Loaded
from raybooth.families.lora import WEIGHTS, described, load_adapters
from raybooth.families.lowrank import LowRank, even, file_name, layers_of, names_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raybooth.families.lowrank import Matrices, Pair

    State = dict[str, Tensor]
    Modules = Mapping[str, nn.Module]

Shapes = dict[str, dict[str, tuple[int, ...]]]
PEFT = "base_model.model."
UPS = ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"))
"""The two matrices of a layer in the layouts that have an alpha beside them."""


@contextlib.contextmanager
def opened(file: Path, framework: str) -> Iterator[Any]:
    """Open a LoRA file for reading, with its tensors as those of a `framework`: "np" or "pt".

    Raises:
        RayboothError: if there is none, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise RayboothError(f"There is no LoRA file {file}: give the path of a .safetensors file.")
    try:
        with safe_open(file, framework) as held:
            yield held
    except (SafetensorError, OSError) as error:
        raise RayboothError(f"The LoRA {file} is not readable as safetensors ({error}): copy or download it again; pickled ones are refused.") from None


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a LoRA file holds, from its header.

    Raises:
        RayboothError: as `opened`.
    """
    with opened(file, "np") as held:
        return {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118


def plain_rank(file: Path) -> int:
    """The largest rank among the adapters of a file if all are plain ones of linear layers; 0 for DoRA and adapters of convolutions.

    Raises:
        RayboothError: as `opened`; if there are no adapters in it, empty ones, or a DoRA that diffusers would misread.
    """
    held = tensor_shapes(file)
    downs = [shape for name, shape in held.items() if _is_down(name) and len(shape) > 1]
    if not downs:
        raise RayboothError(f"{file} holds no LoRA: its tensors are not the pairs of matrices that one is made of.")
    if any(0 in shape for shape in held.values()):
        raise RayboothError(f"The LoRA {file} has matrices without values: make it again with a rank of 1 or more.")
    magnitudes = _magnitudes(held)
    if not all(map(_is_read, magnitudes)):
        raise _dora(file)
    return 0 if magnitudes or any(len(s) > 2 for s in downs) else max(s[0] for s in downs)


def _is_down(name: str) -> bool:
    """Whether it is the first matrix of a layer: lora_A in PEFT's names, lora_down, lora.down, lora_linear_layer.down, qkv_lora1.down in others'."""
    return "lora" in name and name.endswith(("lora_A.weight", "down.weight"))


def is_dora(file: Path) -> bool:
    return bool(_magnitudes(tensor_shapes(file)))


def write(family: Family, low: LowRank, target: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` to `target`, in diffusers' layout."""
    import diffusers
    from peft import LoraConfig

    layers: dict[str, Any] = {}
    for part, tensors in low.tensors().items():
        # PEFT matches the ends of names, so these fit with `text_model.` and without.
        names = [layer.removeprefix("text_model.") for layer in low.parts[part]]
        layers[f"{part}_lora_layers"] = tensors
        layers[f"{part}_lora_adapter_metadata"] = described(LoraConfig(r=low.rank, lora_alpha=low.rank, target_modules=names))
    getattr(diffusers, family.pipeline).save_lora_weights(target, weight_name=WEIGHTS, **layers)


def read(family: Family, modules: "Modules", file: Path) -> LowRank:
    """A LoRA for the model that has these parts, whoever made it, with alpha / rank multiplied into `up`.

    Args:
        modules: all that can be fine-tuned, with weights or without (lowrank.hollow).

    Raises:
        RayboothError: if it cannot be read, is not a plain LoRA, or does not fit.
    """
    with opened(file, "pt") as held:
        tensors, header = {name: held.get_tensor(name) for name in held.keys()}, held.metadata() or {}  # noqa: SIM118
    if _magnitudes(tensors):
        raise _dora(file)
    known = {part: _shapes(part, modules[part]) for part in family.trainable(text_encoder=True)}
    try:
        tensors, how = _of_a_part(family, known, file, tensors, json.loads(header.get("lora_adapter_metadata", "{}")))
        state = _in_diffusers_names(family, modules, _scaled(tensors))
        peft = {part: _in_peft_names(part, state) for part in known}
        parts = {part: _pairs(part, own, how) for part, own in peft.items()}
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        raise RayboothError(
            f"The LoRA {file} is of no layout that diffusers knows for {family.name} ({reason(error)}): give one that was made for such a model."
        ) from None
    _check(parts, known, file, len(state))
    return even(parts)


def _shapes(part: str, module: "nn.Module") -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.weight.shape) for name, layer in layers_of(part, module).items()}


def matrices(family: Family, modules: "Modules", file: Path) -> "Matrices":
    """What `read` returns, by the layers' own names: part -> layer -> (down (rank, in), up (out, rank)), applied to a layer's input beside it."""
    parts: Matrices = {}
    for part, layers in read(family, modules, file).parts.items():
        own = names_of(part, modules[part])
        parts[part] = {own[name]: pair for name, pair in layers.items()}
    return parts


def merge(family: Family, loaded: Loaded, file: Path) -> None:
    """Add the LoRA of `file` to the weights of the loaded parts: drawing then costs what the base does. For bfloat16 see `load_adapters`.

    Raises:
        RayboothError: as `read`.
    """
    if is_dora(file):
        return load_adapters(family, loaded, file)
    import torch

    low = read(family, loaded.modules, file)
    if next(loaded.modules[family.denoiser].parameters()).dtype is torch.bfloat16:
        with tempfile.TemporaryDirectory() as scratch:
            write(family, low, Path(scratch))
            return load_adapters(family, loaded, Path(scratch))
    for part, pairs in low.parts.items():
        layers = layers_of(part, loaded.modules[part])
        for name, (down, up) in pairs.items():
            weight = layers[name].weight
            weight.data += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape).to(weight)


def _magnitudes(names: Iterable[str]) -> list[str]:
    return [n for n in names if "dora_scale" in n or "lora_magnitude_vector" in n]


def _is_read(magnitude: str) -> bool:
    """Whether diffusers reads a magnitude: it drops kohya's, does not know PEFT's own names, and transformers 5 reads none back."""
    return "dora_scale" not in magnitude and not magnitude.startswith((PEFT, "text_encoder"))


def _dora(file: Path) -> RayboothError:
    return RayboothError(f"The LoRA {file} is a DoRA, whose magnitudes diffusers does not read from every layout: only plain LoRAs can be taken over.")


def _of_a_part(family: Family, known: Shapes, file: Path, tensors: "State", how: dict[str, Any]) -> "tuple[State, dict[str, Any]]":
    """The tensors and their metadata by part. PEFT's own files do not name theirs: it is the one that has such layers, and the metadata lies beside them."""
    if not all(k.startswith(PEFT) for k in tensors):
        return tensors, how
    bare = {k.removeprefix(PEFT): t for k, t in tensors.items()}
    layer = min(bare).partition(".lora_")[0]
    part = next((p for p, layers in known.items() if file_name(p, layer) in layers), family.denoiser)
    beside = file.with_name("adapter_config.json")
    how = json.loads(beside.read_text()) if beside.exists() else {}
    return {f"{part}.{k}": t for k, t in bare.items()}, {f"{part}.{k}": v for k, v in how.items()}


def _scaled(tensors: "State") -> "State":
    """The tensors with alpha / rank of each layer multiplied into its `up`: diffusers mistakes the names of layers whose alpha differs from the others'."""
    rest = {k: t for k, t in tensors.items() if not k.endswith(".alpha")}
    for key, alpha in tensors.items():
        layer = key.removesuffix(".alpha")
        for down, up in UPS if key.endswith(".alpha") else ():
            if layer + down in rest and layer + up in rest:
                rest[layer + up] = rest[layer + up].float() * (alpha.item() / rest[layer + down].shape[0])
    return rest


def _in_diffusers_names(family: Family, modules: "Modules", tensors: "State") -> "State":
    import diffusers

    unet = {"unet_config": modules["unet"].config} if family.denoiser == "unet" else {}
    state, *_ = getattr(diffusers, family.pipeline).lora_state_dict(dict(tensors), return_lora_metadata=True, **unet)
    return state


def _in_peft_names(part: str, state: "State") -> "State":
    """One part's tensors, by diffusers' converters, both for text encoders one after the other: its guess fails where only some layers are adapted."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    own = {k.removeprefix(f"{part}."): t for k, t in state.items() if k.startswith(f"{part}.")}
    if not own or any(".lora_A." in k for k in own):
        return own
    if not part.startswith("text_encoder"):
        return convert_unet_state_dict_to_peft(own)
    return convert_state_dict_to_peft(convert_state_dict_to_peft(own, StateDictType.DIFFUSERS_OLD), StateDictType.DIFFUSERS)


def _pairs(part: str, own: "State", how: dict[str, Any]) -> "dict[str, Pair]":
    """One part's pairs of matrices, scaled as the metadata `how` says."""
    how = {k.removeprefix(f"{part}."): v for k, v in how.items() if k.startswith(f"{part}.")}
    downs = {k.removesuffix(".lora_A.weight"): t for k, t in own.items() if k.endswith(".lora_A.weight")}
    return {file_name(part, k): (down.float(), own[f"{k}.lora_B.weight"].float() * _scale(how, k, down.shape[0])) for k, down in downs.items()}


def _scale(how: dict[str, Any], layer: str, rank: int) -> float:
    """A layer's scale by the metadata `how`. PEFT's patterns are regular expressions; a stranger's are not run: saved ones are names, or ends of names."""
    if "lora_alpha" not in how:
        return 1.0
    patterns: dict[str, float] = how.get("alpha_pattern") or {}
    if odd := next((p for p in patterns if not re.fullmatch(r"[\w.]+", p)), None):
        raise ValueError(f"its alpha_pattern '{odd}' is no layer's name")
    alpha: float = next((a for p, a in patterns.items() if f".{layer}".endswith(f".{p}")), how["lora_alpha"])
    return alpha / (rank**0.5 if how.get("use_rslora") else rank)


def _check(parts: "Matrices", known: Shapes, file: Path, tensors: int) -> None:
    def refused(why: str) -> RayboothError:
        return RayboothError(f"The LoRA {file} does not fit the base model ({why}): give the one it was made for with --base.")

    for part, layers in parts.items():
        for layer, (down, up) in layers.items():
            if layer not in known[part]:
                raise refused(f"it changes {part}.{layer}, which the model does not have")
            own, wanted = (up.shape[0], *down.shape[1:]), known[part][layer]
            if up.shape[1] != down.shape[0]:
                raise refused(f"the two matrices of its {part}.{layer} are of ranks {down.shape[0]} and {up.shape[1]}")
            if not (down.isfinite().all() and up.isfinite().all()):
                raise RayboothError(f"The LoRA {file} holds values that are not finite in {part}.{layer}: its training had failed, use an earlier state of it.")
            if own != wanted:
                raise refused(f"its {part}.{layer} is for a weight of {own}, the model's is {wanted}")
    used = 2 * sum(map(len, parts.values()))
    if not used or used != tensors:
        raise refused(f"{tensors - used} of its {tensors} tensors are no low-rank updates of layers of this model")
