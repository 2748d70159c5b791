"""Low-rank updates as plain tensors: what every LoRA file holds, whatever its layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.families.base import Family
from raybooth.families.parts import unloaded

if TYPE_CHECKING:
    from torch import Tensor, nn

    Pair = tuple[Tensor, Tensor]
    Matrices = dict[str, dict[str, Pair]]


@dataclass(frozen=True)
class LowRank:
    """Low-rank updates of layers, `up @ down`, with alpha equal to the rank. A convolution's kernel is part of `down`.

    Attributes:
        parts: part -> layer -> (down (rank, in, ...), up (out, rank, ...)). A CLIP's layers have the names of other programs' files, `text_model.` first.
    """

    rank: int
    parts: "Matrices"

    def tensors(self) -> "dict[str, dict[str, Tensor]]":
        """part -> PEFT's key -> tensor."""
        return {
            part: {f"{layer}.lora_{k}.weight": t for layer, pair in layers.items() for k, t in zip("AB", pair, strict=True)}
            for part, layers in self.parts.items()
        }  # fmt: skip


def even(parts: "Matrices") -> LowRank:
    """The updates at one rank, padded with zeros: readers disagree about ranks and alphas that differ from layer to layer."""
    import torch

    rank = max(down.shape[0] for layers in parts.values() for down, _ in layers.values())

    def padded(down: "Tensor", up: "Tensor") -> "Pair":
        more = rank - down.shape[0]
        wide = torch.cat([up, up.new_zeros(up.shape[0], more, *up.shape[2:])], 1)
        return torch.cat([down, down.new_zeros(more, *down.shape[1:])]).contiguous(), wide.contiguous()

    return LowRank(rank, {part: {layer: padded(*pair) for layer, pair in layers.items()} for part, layers in parts.items() if layers})


def names_of(part: str, module: "nn.Module") -> dict[str, str]:
    """The layers that can have a low-rank update: the name they have in files -> their own."""
    from torch import nn

    return {file_name(part, name): name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def layers_of(part: str, module: "nn.Module") -> "dict[str, Any]":
    """The layers that can have a low-rank update, by the names they have in files."""
    return {name: module.get_submodule(own) for name, own in names_of(part, module).items()}


def file_name(part: str, name: str) -> str:
    """A layer's name in files: transformers 5 has dropped the `text_model.` of a CLIP's layers, and other programs look for it."""
    bare = part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection"))
    return f"text_model.{name}" if bare else name


def hollow(family: Family, folder: Path) -> "dict[str, nn.Module]":
    """The parts that can have updates, from their configurations alone: the right shapes, and no weights (on the meta device)."""
    import torch

    with torch.device("meta"):
        return unloaded(family, folder, family.trainable(text_encoder=True)).modules
