"""A LoRA from a full fine-tuning: the best approximation of each layer's change by a matrix of low rank (Eckart and Young 1936)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raybooth.families.lowrank import layers_of

if TYPE_CHECKING:
    from raybooth.families.lowrank import Pair

Told = Callable[[list[tuple[str, Any]]], Iterable[tuple[str, Any]]]


@dataclass(frozen=True)
class Energy:
    """Squared changes of a part's weights: all of the `layers` that can have a LoRA, what the LoRA `kept` of it, and `others` (norms, biases, embeddings)."""

    kept: float = 0.0
    layers: float = 0.0
    others: float = 0.0

    def __add__(self, more: "Energy") -> "Energy":
        return Energy(self.kept + more.kept, self.layers + more.layers, self.others + more.others)

    def __str__(self) -> str:
        """The shares of the energy, in words."""
        share = 100 * self.others / (self.layers + self.others)
        lost = f"; {share:.1f}% of all change is in norms, biases and embeddings, where a LoRA cannot be" if share >= 0.1 else ""
        return f"{100 * self.kept / self.layers:.1f}% of the layers' change kept{lost}"


def extract(part: str, base: nn.Module, tuned: nn.Module, rank: int, told: Told) -> "tuple[dict[str, Pair], Energy]":
    """The low-rank updates from `base` to `tuned`, layer -> (down, up), of at most `rank`; and what they keep.

    Args:
        told: passes the layers on one by one, and shows progress.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = layers_of(part, base)
    pairs, energy, total = {}, Energy(), _change(base, tuned)
    for name, layer in told(list(layers_of(part, tuned).items())):
        update = (layer.weight.detach().float() - before[name].weight.detach().float()).to(device)
        if not update.any():
            continue
        pairs[name], kept = factors(update, rank)
        energy += Energy(kept, float(update.double().square().sum()))
    return pairs, energy + Energy(others=max(0.0, total - energy.layers))


def factors(update: Tensor, rank: int) -> "tuple[Pair, float]":
    """(down, up), each with the root of the singular values, so that neither is tiny in half precision; and the sum of squares that they keep."""
    u, s, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
    root = s[:rank].sqrt()
    down, up = root[:, None] * v[:rank], u[:, :rank] * root
    down, up = down.reshape(-1, *update.shape[1:]), up.reshape(*up.shape, *(1 for _ in update.shape[2:]))
    return (down.cpu().contiguous(), up.cpu().contiguous()), float(s[:rank].double().square().sum())


def _change(base: nn.Module, tuned: nn.Module) -> float:
    """The sum of the squares of all changes."""
    after = dict(tuned.named_parameters())
    return sum(float((after[name].detach().double() - p.detach().double()).square().sum()) for name, p in base.named_parameters())
