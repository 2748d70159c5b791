"""The base model as the teacher of class rows (knowledge distillation; Hinton et al. 2015)."""

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from raybooth.families import Family, Loaded
from raybooth.families.lora import adapters_off, has_adapters


class Teacher:
    """Predicts as the model did before the training.

    Its adapters are switched off for that. If the weights themselves are trained, there is a frozen copy of the denoiser, which must be
    made before they change, in `dtype`: what the forward pass is cast to.
    """

    def __init__(self, family: Family, loaded: Loaded, trained: nn.ModuleDict, dtype: torch.dtype | None):
        self.family, self.trained = family, trained
        denoiser = loaded.modules[family.denoiser]
        # By torch's own to(): diffusers' warns about modules to keep in float32 where there are none.
        self.copy = None if has_adapters(denoiser) else nn.Module.to(deepcopy(denoiser), dtype or torch.float32).requires_grad_(False).eval()
        self.loaded = replace(loaded, modules={family.denoiser: self.copy}) if self.copy else loaded

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Turn gradients and adapters off, for as long as the base model is asked for something."""
        with torch.no_grad(), adapters_off(self.trained.values()):
            yield

    def predict(self, z: Tensor, t: Tensor, words: dict[str, Tensor]) -> Tensor:
        """The base model's prediction for noised latents (n, c, h, w) at t (n,), given its own `words`."""
        with self.asked():
            return self.family.predict(self.loaded, z, t, words)
