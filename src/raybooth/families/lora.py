"""Low-rank adapters (Hu et al. 2021) by PEFT: put in, switched off, saved and loaded in diffusers' form."""

import contextlib
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from raybooth.errors import RayboothError
from raybooth.families.base import Family, Loaded
from raybooth.families.lowrank import file_name
from raybooth.families.parts import load, unloaded
from raybooth.files import write_atomically
from raybooth.noise import reseeded
from raybooth.sections import Lora

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file that diffusers' load_lora_weights looks for."""
TAKERS = (nn.Linear, nn.Conv2d)
"""The layers that adapters go on. PEFT adapts embeddings too, but diffusers' files have no names for these."""


def add_adapters(family: Family, loaded: Loaded, parts: Iterable[str], how: Lora, seed: int) -> None:
    """Put adapters in float32 on the targets of `parts`: they change nothing yet, and only they require gradients afterwards.

    DoRA (Liu et al. 2024) is for the denoiser only. All that is random in them comes from `seed`.
    """
    from peft import LoraConfig

    parts = tuple(parts)
    _check_targets(family, {part: loaded.modules[part] for part in parts}, how)
    for part in parts:
        targets = _targets(family, part, loaded.modules[part], how)
        alpha = how.rank if how.alpha is None else how.alpha
        # transformers 5 does not read back what DoRA adds to a text encoder: there it stays LoRA.
        config = LoraConfig(
            r=how.rank, lora_alpha=alpha, lora_dropout=how.dropout, use_dora=how.dora and part == family.denoiser,  # type: ignore[arg-type]
            target_modules=list(targets),
        )  # fmt: skip
        module: Any = loaded.modules[part]
        with reseeded(next(module.parameters()).device, seed, "adapter", part):
            module.add_adapter(config)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        _measure_again(module)


def spare_copies(module: nn.Module) -> None:
    """Keep PEFT from casting the inputs of adapters on a base in half precision, which is trained under autocast: that casts them.

    PEFT would cast them to the adapters' float32 first, and one more copy would be kept for the backward pass. DoRA goes by the precision of its
    inputs, so there PEFT still casts.
    """
    for layer in module.modules():
        if _is_adapted(layer) and next(layer.get_base_layer().parameters()).dtype is not torch.float32:
            how: Any = layer
            how.cast_input_dtype_enabled = bool(how.lora_variant)


def _measure_again(module: nn.Module) -> None:
    """Compute DoRA's magnitudes anew in float32: PEFT takes them in the base's precision, and rounded ones make another model."""
    for layer in module.modules():
        if _is_adapted(layer):
            how: Any = layer
            for name, magnitude in how.lora_magnitude_vector.items():
                a, b = how.lora_A[name].weight, how.lora_B[name].weight
                magnitude.update_layer(base_layer=how.get_base_layer(), lora_A=a, lora_B=b, scaling=how.scaling[name])


def check_targets(family: Family, folder: Path, how: Lora, text_encoder: bool) -> None:
    """Check the targets as add_adapters() does, without weights.

    Raises:
        RayboothError: if a target is in none of the parts that are trained, or takes no adapter, or if diffusers would not read an encoder's.
    """
    with torch.device("meta"):
        _check_targets(family, unloaded(family, folder, family.trainable(text_encoder)).modules, how)


def _check_targets(family: Family, modules: Mapping[str, nn.Module], how: Lora) -> None:
    usual, takers = ", ".join(family.lora_targets[:3]), {k for module in modules.values() for k, layer in module.named_modules() if isinstance(layer, TAKERS)}
    for target in how.targets or ():
        found = [layer for module in modules.values() for layer in _layers(module, target)]
        if not found:
            near = difflib.get_close_matches(target, sorted({k.rpartition(".")[2] for k in takers} | set(family.lora_targets)), 1, 0.5)
            meant = f"did you mean '{near[0]}'?" if near else f"leave it out, or name some such as {usual}."
            raise RayboothError(f"lora.targets: {family.name} has no layer '{target}' in what is trained ({', '.join(modules)}); {meant}")
        for layer in found:
            if not isinstance(layer, TAKERS):
                within = [f"{target}.{k}" for k, inner in layer.named_modules() if isinstance(inner, TAKERS)]
                advice = f"name what is in it, such as {', '.join(within[:3])}." if within else f"leave it out, or name some such as {usual}."
                raise RayboothError(f"lora.targets: no adapter goes on '{target}' of {family.name} ({type(layer).__name__}); {advice}")
    if how.targets and not any(_layers(modules[family.denoiser], target) for target in how.targets):
        raise RayboothError(f"lora.targets = {how.targets}: {family.name} has no such layers; leave it out, or name some such as {usual}.")
    for part in (p for p in modules if p != family.denoiser):
        _check_readable(family, part, modules[part], how)


def _check_readable(family: Family, part: str, encoder: nn.Module, how: Lora) -> None:
    """Refuse targets of an encoder whose file diffusers could not read: it tells the layout by the layers of attention."""
    targets = list(_targets(family, part, encoder, how))
    named = {name.rpartition(".")[2] for target in targets for name in _names(encoder, target)}
    if not named & set(family.encoder_lora_targets):
        raise RayboothError(
            f"lora.targets: of {part} only {', '.join(targets)} would be trained, and diffusers opens no such file; name one of "
            f"{', '.join(family.encoder_lora_targets)} beside, or set finetune.text_encoder = false."
        )


def _layers(module: nn.Module, target: str) -> list[nn.Module]:
    return [module.get_submodule(name) for name in _names(module, target)]


def _names(module: nn.Module, target: str) -> list[str]:
    """The names of the layers that are a target, as PEFT finds them: by the end of their names."""
    return [name for name, _ in module.named_modules() if name and f".{name}".endswith(f".{target}")]


def _targets(family: Family, part: str, module: nn.Module, how: Lora) -> Iterable[str]:
    """The targets that were asked for and that the part has; if it has none of them, the family's usual ones."""
    usual = family.lora_targets if part == family.denoiser else family.encoder_lora_targets
    return [t for t in how.targets or () if _layers(module, t)] or usual


def has_adapters(module: nn.Module) -> bool:
    return any(_is_adapted(layer) for layer in module.modules())


@contextlib.contextmanager
def adapters_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch the adapters off for the length of the context, which leaves the base model; modules without adapters stay as they are."""
    adapted: list[Any] = [module for module in modules if has_adapters(module)]
    for module in adapted:
        module.disable_adapters()
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters()


def save_adapters(family: Family, modules: Mapping[str, nn.Module], target: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` to `target`, with rank, alpha and targets in its header."""
    import diffusers
    from peft import get_peft_model_state_dict

    layers: dict[str, Any] = {}
    for part, module in modules.items():
        adapted: Any = module
        layers[f"{part}_lora_layers"] = {file_name(part, name): tensor for name, tensor in get_peft_model_state_dict(adapted).items()}
        layers[f"{part}_lora_adapter_metadata"] = described(adapted.peft_config["default"])
    getattr(diffusers, family.pipeline).save_lora_weights(target, weight_name=WEIGHTS, **layers)
    order_header(target / WEIGHTS)


def order_header(file: Path) -> None:
    """Put the texts in a safetensors file's header in order, which the library writes in a random one: equal adapters are equal files then."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of it
    write_atomically(file, len(text).to_bytes(8, "little") + text + data[8 + length :])


def described(how: Any) -> dict[str, Any]:
    """What a file's header says of its adapters: the same for equal ones (PEFT keeps targets as a set), and without the folder of the base.

    Only what differs from PEFT's defaults: diffusers makes a PEFT configuration from it, and an older PEFT refuses what it does not know. But an older
    diffusers (0.36) fails without `rank_pattern`. Without the dropout, which is training's: diffusers would go on dropping while it draws.
    """
    from peft import LoraConfig

    usual, values = LoraConfig().to_dict(), how.to_dict()
    own = {k: v for k, v in values.items() if v != usual.get(k) and k not in ("base_model_name_or_path", "lora_dropout")}
    return own | {"r": how.r, "lora_alpha": how.lora_alpha, "target_modules": sorted(values["target_modules"]), "rank_pattern": values["rank_pattern"]}


def load_adapters(family: Family, loaded: Loaded, folder: Path) -> None:
    """Merge the adapters of `folder` (or of one file) into the loaded parts: drawing then costs what the base does.

    Beside weights in bfloat16 they stay unmerged, as rounding would swallow their small values; DoRA's in float32, as a rounded magnitude scales a whole row.

    Raises:
        RayboothError: if none of them belongs to this model.
    """
    adapted_parts, state = _put_in(family, loaded.modules, folder)
    layers: dict[str, Any] = {f"{part}.{k}.": v for part, module in loaded.modules.items() for k, v in module.named_modules() if _is_adapted(v)}
    if not layers and adapted_parts <= loaded.modules.keys():  # they may be of parts that are not loaded
        raise RayboothError(f"The adapters in {folder} are none of {family.name}'s as diffusers names them: they would change nothing.")
    for prefix, layer in layers.items():
        if layer.weight.dtype != torch.bfloat16:
            layer.merge()
        elif layer.lora_magnitude_vector:
            _in_float32(layer, {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)})


def _in_float32(layer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a DoRA layer, whose adapter diffusers has cast to the precision of the weights, the file's own values again."""
    for name, magnitude in layer.lora_magnitude_vector.items():
        own = {"lora_A.weight": layer.lora_A[name], "lora_B.weight": layer.lora_B[name], "lora_magnitude_vector": magnitude}
        for key, module in own.items():
            found = tensors.get(key, tensors.get(f"{key}.weight"))
            assert found is not None, key  # diffusers has read them from there
            module.weight.data = found.to(module.weight.device, torch.float32).reshape(module.weight.shape)


def _put_in(family: Family, modules: Mapping[str, nn.Module], folder: Path) -> tuple[set[str], dict[str, torch.Tensor]]:
    """Put a file's adapters into `modules`; return the parts that it has adapters for, loaded or not, and its tensors."""
    import diffusers

    source, name = (folder.parent, folder.name) if folder.suffix == ".safetensors" else (folder, WEIGHTS)
    pipeline = getattr(diffusers, family.pipeline)
    state, *rest, metadata = pipeline.lora_state_dict(source, weight_name=name, return_lora_metadata=True)
    alphas = rest[0] if rest else None
    adapted_parts = {part for part in family.trainable(text_encoder=True) if any(k.startswith(f"{part}.") for k in state)}
    for part in adapted_parts & modules.keys():
        module: Any = modules[part]
        if part == family.denoiser:
            module.load_lora_adapter(state, prefix=part, network_alphas=alphas, metadata=metadata)
        else:
            pipeline.load_lora_into_text_encoder(state, alphas, module, prefix=part, metadata=metadata)
        module.eval()  # a file of others may name a dropout, and new layers begin in training mode
    return adapted_parts, state


def load_merged(family: Family, base: Path, folder: Path, parts: Iterable[str]) -> Loaded:
    """`parts` of the base with the adapters of `folder` in their weights, as if there had never been any."""
    from diffusers.utils import recurse_remove_peft_layers

    loaded = load(family, base, tuple(parts))
    load_adapters(family, loaded, folder)
    for module in loaded.modules.values():
        recurse_remove_peft_layers(module)
        module.__dict__.pop("peft_config", None)
        module.__dict__.pop("_hf_peft_config_loaded", None)  # with it transformers would save the adapters alone
    return loaded


def _is_adapted(layer: nn.Module) -> TypeGuard["BaseTunerLayer"]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)
