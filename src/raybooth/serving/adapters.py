"""Many subjects' low-rank adapters on one base model, in one batch: each row of a pass is led through its own subject's."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raybooth.errors import RayboothError

if TYPE_CHECKING:
    from raybooth.families.lowrank import Matrices


class Stacked(nn.Module):
    """A linear layer with `slots` adapters of one rank beside it; smaller ones are filled up with zeros.

    Every pass has the same shape whoever shares it, and each row is a product of its own, so its bits do not depend on its neighbours.
    Slot 0 stays zero: the layer itself.
    """

    def __init__(self, layer: nn.Linear, slots: int, rank: int, chosen: Callable[[], Tensor]):
        super().__init__()
        self.layer, self.chosen = layer, chosen
        like = layer.weight
        self.down = torch.zeros(slots + 1, rank, layer.in_features, device=like.device, dtype=like.dtype)
        self.up = torch.zeros(slots + 1, layer.out_features, rank, device=like.device, dtype=like.dtype)

    def put(self, slot: int, matrices: tuple[Tensor, Tensor] | None) -> None:
        self.down[slot] = 0
        self.up[slot] = 0
        if matrices:
            down, up = matrices
            self.down[slot, : len(down)] = down.to(self.down)
            self.up[slot, :, : len(down)] = up.to(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., in) -> (rows, ..., out)."""
        slot = self.chosen()
        rows = x.reshape(len(slot), -1, x.shape[-1])
        beside = torch.bmm(torch.bmm(rows, self.down[slot].transpose(1, 2)), self.up[slot].transpose(1, 2))
        out: Tensor = self.layer(x)
        return out + beside.view(out.shape)


def slot_bytes(parts: Iterable[nn.Module], rank: int) -> int:
    """The bytes of a slot if every linear layer of `parts` gets adapters."""
    linear = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear)]
    return sum(rank * (m.in_features + m.out_features) * m.weight.element_size() for m in linear)


class Adapters:
    """The adapters in memory: at most `slots`; the least recently used goes first.

    Args:
        modules: the parts of the base; their layers are replaced as adapters for them come.
        rank: of every slot; adapters of a larger one do not fit.
    """

    def __init__(self, modules: Mapping[str, nn.Module], slots: int, rank: int):
        self.modules, self.slots, self.rank = modules, slots, rank
        self.layers: dict[tuple[str, str], Stacked] = {}
        self.held: OrderedDict[str, int] = OrderedDict()  # name -> slot, the one used last at the end
        self._chosen = torch.zeros(1, dtype=torch.long)

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def put(self, name: str, matrices: "Matrices") -> None:
        """Put adapters into a free slot, or in place of the least recently used.

        Raises:
            RayboothError: if they do not fit the base.
        """
        layers = {(part, layer): pair for part, of in matrices.items() for layer, pair in of.items()}
        for key, pair in layers.items():
            self._stack(key, pair)
        slot = len(self.held) + 1 if len(self.held) < self.slots else self.held.popitem(last=False)[1]
        for key, stacked in self.layers.items():
            stacked.put(slot, layers.get(key))
        self.held[name] = slot

    def _stack(self, key: tuple[str, str], pair: tuple[Tensor, Tensor]) -> None:
        part, name = key
        layer = self.layers.get(key) or self.modules[part].get_submodule(name)
        plain = layer.layer if isinstance(layer, Stacked) else layer
        down, up = pair
        if not isinstance(plain, nn.Linear) or (up.shape[0], down.shape[1]) != plain.weight.shape or len(down) > self.rank:
            raise RayboothError(f"The adapter of {part}.{name} does not fit the base model: it was made for another one.")
        if key not in self.layers:
            self.layers[key] = Stacked(plain, self.slots, self.rank, lambda: self._chosen)
            self.modules[part].set_submodule(name, self.layers[key])

    def use(self, names: Sequence[str]) -> None:
        """Choose an adapter for each row of the passes that follow; "" is the base."""
        for name in dict.fromkeys(n for n in names if n):
            self.held.move_to_end(name)
        device = next((layer.down.device for layer in self.layers.values()), None)
        self._chosen = torch.tensor([self.held[n] if n else 0 for n in names], device=device)
