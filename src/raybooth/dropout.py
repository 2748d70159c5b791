"""Dropout with a mask for each row: the same on any worker, in any pass, and when activations are recomputed."""

from typing import Any

import torch
from torch import Tensor, nn

from raybooth.noise import generator

Key = tuple[Any, ...]


class RowDropout(nn.Module):
    """nn.Dropout (Srivastava et al. 2014) on rows (n, ...), each masked by a generator keyed by `keys[i]` and this layer's name.

    The generator is the device's: masks are too large to be drawn on the CPU and sent. `keys` is shared by the layers of a part
    and set before each pass: a seed and whatever else the mask is to depend on.
    """

    def __init__(self, p: float, name: str, keys: list[Key]):
        super().__init__()
        self.p, self.name, self.keys = p, name, keys

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):  # without gradients the base model is being asked, as the teacher of other rows
            return x
        kept = torch.stack([self._mask(x[0], key) for key in self.keys])
        return x * kept / (1 - self.p)

    def _mask(self, row: Tensor, key: Key) -> Tensor:
        number = generator(*key, self.name).initial_seed()
        random = torch.Generator(row.device).manual_seed(number)
        return torch.rand(row.shape, generator=random, device=row.device) >= self.p


def key_dropout(module: nn.Module) -> list[Key]:
    """Replace every nn.Dropout that drops anything; returns the list of keys that the masks go by, to be filled before each pass."""
    keys: list[Key] = []
    for name, parent in module.named_modules():
        for child, layer in parent.named_children():
            if type(layer) is nn.Dropout and layer.p:
                setattr(parent, child, RowDropout(layer.p, f"{name}.{child}", keys))
    return keys
