"""Keyed randomness, and what noise does to latents.

Every random draw of a run comes from a generator keyed by what it is for, on the CPU: so it is the same on any worker,
in any batch, before and after a restart, and no random state needs to be stored.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raybooth.errors import RayboothError

Prediction = Literal["epsilon", "v_prediction"]


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator that depends on (seed, key) alone, e.g. (seed, "noise", step, row)."""
    text = "\x1f".join(str(k) for k in (seed, *key))
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(number)


def normal(shape: Sequence[int], seed: int, *key: str | int) -> Tensor:
    """Standard normal draws of (seed, key): (*shape), float32, on the CPU."""
    return torch.randn(tuple(shape), generator=generator(seed, *key))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU to `device` without waiting for its pending work. For more than a few KB, CUDA would wait unless they are in pinned memory, which
    torch keeps until they are there.
    """
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


@contextlib.contextmanager
def reseeded(device: torch.device, seed: int, *key: str | int) -> Iterator[None]:
    """Set torch's own random state from (seed, key), for layers that draw by themselves (dropout), and put it back afterwards."""
    number = generator(seed, *key).initial_seed()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # Not torch.manual_seed: in a process without CUDA that records the call stack each time, a millisecond per step.
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            torch.cuda.manual_seed(number)
        yield


@dataclass(frozen=True)
class Diffusion:
    """The forward process and what the network predicts (Ho et al. 2020, eq. 4; Salimans and Ho 2022 for v).

    `alphas_cumprod` is (T,), float32: the share of the signal's variance left at each timestep.
    """

    alphas_cumprod: Tensor
    prediction: Prediction

    def to(self, device: torch.device) -> "Diffusion":
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def draw_t(self, random: torch.Generator) -> Tensor:
        """A timestep to train at, uniform: (1,), int64."""
        return torch.randint(self.timesteps, (1,), generator=random)

    def weight(self, t: Tensor, gamma: float) -> Tensor:
        """Weights (n,) of the loss at timesteps (n,): min-SNR-gamma (Hang et al. 2023), or ones where gamma is 0."""
        if not gamma:
            return torch.ones(t.shape, device=t.device)
        alpha = self.alphas_cumprod.to(t.device)[t]
        snr = alpha / (1 - alpha)
        # As a weight of the squared error of noise, min(SNR, gamma) / SNR without its 0 / 0, or of velocity (which itself weighs SNR + 1).
        return (gamma / snr).clamp(max=1) if self.prediction == "epsilon" else snr.clamp(max=gamma) / (snr + 1)

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of clean latents (n, c, h, w) and timesteps (n,)."""
        signal, sigma = self._coefficients(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to predict at x_t."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._coefficients(t)
        return signal * noise - sigma * x0

    def clean(self, xt: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        """The clean latents that follow from x_t and the prediction for it; timesteps need not be whole."""
        signal, sigma = self._coefficients(t.round().long())
        if self.prediction == "epsilon":
            return (xt - sigma * predicted) / signal
        return signal * xt - sigma * predicted


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al. 2022; Esser et al. 2024): a straight line from latents to noise, and its velocity.

    Times are in the schedulers' unit, 1000 at pure noise. `shift` moves them towards noise, as the model's sampler does.
    """

    shift: float = 1.0

    def to(self, device: torch.device) -> "Flow":
        return self

    def draw_t(self, random: torch.Generator) -> Tensor:
        """A time to train at, logit-normal (Esser et al. 2024, section 3.1), then shifted: (1,), float32."""
        sigma = torch.sigmoid(torch.randn(1, generator=random))
        return 1000 * self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def weight(self, t: Tensor, gamma: float) -> Tensor:
        """Ones (n,): drawing the times is how a flow weighs them.

        Raises:
            RayboothError: if min-SNR is asked for.
        """
        if gamma:
            raise RayboothError("finetune.min_snr_gamma is for models of epsilon or velocity, and this one is a flow: leave it out.")
        return torch.ones(t.shape, device=t.device)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t of clean latents (n, c, h, w) and times (n,)."""
        sigma = (t / 1000).view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity, the same all along the line."""
        return noise - x0

    def clean(self, zt: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        """The clean latents at the end of the line from z_t along the predicted velocity."""
        return zt - (t / 1000).view(-1, 1, 1, 1) * predicted


Objective = Diffusion | Flow
