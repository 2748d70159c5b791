"""The training data: weighted rows of latents, how they are dealt to steps, and the random draws for each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raybooth.noise import Objective, generator, normal, to_device


@dataclass(frozen=True)
class TrainingSet:
    """Rows of latents; the whole set, being small, lies on the device.

    Attributes:
        mean, std: (n, c, h, w) of the posterior, as the denoiser sees it.
        prompt: index into `prompts` of each row; not on the device, so that reading it need not wait for that.
        weight: (n,), that of each row in the loss.
        instances: the number of rows of the subject, which come first; the others are of the class.
        conditioning: the base model's, of the prompts, each tensor (prompts, ...); None where all the text encoders are trained.
        teacher: whether the target of a class row is the base model's prediction, and not the noise itself (or the velocity).
    """

    mean: Tensor
    std: Tensor
    prompt: Sequence[int]
    weight: Tensor
    prompts: Sequence[str]
    instances: int
    conditioning: dict[str, Tensor] | None = None
    teacher: bool = False

    def to(self, device: torch.device) -> "TrainingSet":
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        if self.conditioning is not None:
            moved["conditioning"] = {k: v.to(device) for k, v in self.conditioning.items()}
        return replace(self, **moved)


def rows_of_step(data: TrainingSet, step: int, batch: int, seed: int) -> list[int]:
    """The rows of a step, for all workers together: `batch` instance rows, then as many class rows (none without prior preservation)."""
    classes = len(data.weight) - data.instances
    rows = [_row(seed, "instance", data.instances, step * batch + i) for i in range(batch)]
    if classes:
        rows += [data.instances + _row(seed, "class", classes, step * batch + i) for i in range(batch)]
    return rows


def dealt(rows: int, rank: int, workers: int, accumulate: int) -> list[range]:
    """The places in a step of `rows` rows that worker `rank` has, one range per pass: `accumulate` passes, or as many as it has rows if fewer."""
    mine = range(rank, rows, workers)
    passes = min(accumulate, len(mine))
    return [mine[i::passes] for i in range(passes)]


def _row(seed: int, what: str, n: int, k: int) -> int:
    """The k-th row of an endless deal in which every epoch is a new permutation of n."""
    epoch, position = divmod(k, n)
    return int(torch.randperm(n, generator=generator(seed, "order", what, epoch))[position])


def noised_rows(
    data: TrainingSet, objective: Objective, seed: int, noise_offset: float, step: int, places: Sequence[int], rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Posterior samples, noise and timesteps, each keyed by (seed, purpose, step, place of the row in the step)."""
    device, shape = data.mean.device, data.mean.shape[1:]
    posterior = to_device(torch.stack([normal(shape, seed, "posterior", step, i) for i in places]), device)
    noise = to_device(torch.stack([normal(shape, seed, "noise", step, i) for i in places]), device)
    if noise_offset:
        offset = to_device(torch.stack([normal((shape[0], 1, 1), seed, "offset", step, i) for i in places]), device)
        noise = noise + noise_offset * offset
    t = to_device(torch.cat([objective.draw_t(generator(seed, "timestep", step, i)) for i in places]), device)
    return data.mean[rows] + data.std[rows] * posterior, noise, t
