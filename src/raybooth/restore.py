"""Puts a checkpoint's weights into a loaded base model, to draw with or to save."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.checkpoint import TENSORS
from raybooth.families import Family, Loaded
from raybooth.manifest import read_manifest
from raybooth.sections import Finetune, Lora

if TYPE_CHECKING:
    from torch import nn


def recipe_of(checkpoint: Path) -> Finetune:
    """How the weights of the folder `checkpoint` were trained."""
    return Finetune(**_recipe(checkpoint)["finetune"])


def restore(family: Family, loaded: Loaded, checkpoint: Path) -> "dict[str, nn.Module]":
    """Put the weights of the folder `checkpoint`, or their moving average if it has one, into `loaded`; returns the trained parts."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    from raybooth.families.lora import add_adapters

    recipe = _recipe(checkpoint)
    finetune = Finetune(**recipe["finetune"])
    parts = family.trainable(finetune.text_encoder)
    if finetune.method == "lora":
        add_adapters(family, loaded, parts, Lora(**recipe["lora"]), recipe["seed"])
    trained = nn.ModuleDict({part: loaded.modules[part] for part in parts})
    tensors = load_file(checkpoint / TENSORS)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            value = tensors.get(f"average.{name}", tensors.get(f"weights.{name}"))
            if value is not None:  # with adapters there are no others in it
                parameter.copy_(value)
    trained.requires_grad_(False).eval()
    return dict(trained)


def _recipe(checkpoint: Path) -> dict[str, Any]:
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    return manifest["recipe"]
