"""fit(): the only training loop, a generator that yields after each optimizer step.

Whoever drives it (Ray, a test, a notebook) adds reporting, checkpoints and stopping from outside.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raybooth.errors import RayboothError
from raybooth.families import Family, Loaded
from raybooth.loss import prior_preserving, row_errors
from raybooth.noise import Diffusion, generator, normal


@dataclass(frozen=True)
class TrainingSet:
    """Rows of latents, the few-shot set whole on the device.

    Attributes:
        mean, std: (n, c, h, w) of the posterior, as the denoiser sees it.
        prompt: (n,) index into `prompts`.
        weight: (n,) of each row in the loss.
        instances: how many of the rows, the first ones, are of the subject; the others are of the class.
        conditioning: (prompts, tokens, width) where the text encoder stays frozen, else None.
    """

    mean: Tensor
    std: Tensor
    prompt: Tensor
    weight: Tensor
    prompts: Sequence[str]
    instances: int
    conditioning: Tensor | None = None

    def to(self, device: torch.device) -> "TrainingSet":
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Settings:
    """What fit() needs to know of the configuration. `batch` counts instance rows over all workers."""

    steps: int
    batch: int
    lr: float
    weight_decay: float
    max_grad_norm: float
    text_encoder: bool
    log_every: int
    seed: int
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Parallel:
    """The group of workers: this one's rank, how to wrap a module so that gradients are averaged, and how to sum."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    total: Callable[[Tensor], Tensor] = lambda value: value


@dataclass(frozen=True)
class Metrics:
    """Means over the steps since the last reading."""

    loss: float
    instance: float
    prior: float
    grad_norm: float


@dataclass(frozen=True)
class Step:
    """One optimizer step, done. `metrics` is there on every `log_every`-th and on the last."""

    number: int
    metrics: Metrics | None


class RowLoss(nn.Module):
    """The trained modules and their loss as one module, so that data parallelism can wrap them together."""

    def __init__(self, family: Family, loaded: Loaded, diffusion: Diffusion, data: TrainingSet, text_encoder: bool):
        super().__init__()
        self.family, self.loaded, self.diffusion, self.data = family, loaded, diffusion, data
        self.text_encoder = text_encoder
        self.trained = nn.ModuleDict({name: loaded.modules[name] for name in family.trainable(text_encoder)})

    def forward(self, rows: Tensor, used: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error of each row. `used` are the prompts of all workers' rows in this step."""
        prompt = self.data.prompt[rows]
        if self.text_encoder:
            texts = [self.data.prompts[i] for i in used.tolist()]
            text = self.family.encode_text(self.loaded, texts)[torch.searchsorted(used, prompt)]
        else:
            assert self.data.conditioning is not None
            text = self.data.conditioning[prompt]
        prediction = self.family.predict(self.trained["unet"], self.diffusion.noisy(x0, noise, t), t, text)
        return row_errors(prediction, self.diffusion.target(x0, noise, t))


def rows_of_step(data: TrainingSet, step: int, batch: int, seed: int) -> list[int]:
    """`batch` instance rows, then as many class rows (none without prior preservation), for all workers together."""
    classes = len(data.weight) - data.instances
    rows = [_dealt(seed, "instance", data.instances, step * batch + i) for i in range(batch)]
    if classes:
        rows += [data.instances + _dealt(seed, "class", classes, step * batch + i) for i in range(batch)]
    return rows


def _dealt(seed: int, what: str, n: int, k: int) -> int:
    """The k-th row of an endless deal in which every epoch is a new permutation of n."""
    epoch, position = divmod(k, n)
    return int(torch.randperm(n, generator=generator(seed, "order", what, epoch))[position])


def fit(
    family: Family, loaded: Loaded, diffusion: Diffusion, data: TrainingSet, settings: Settings, parallel: Parallel = Parallel()
) -> Iterator[Step]:  # fmt: skip
    """Fine-tune `loaded` in place by the prior-preserving loss.

    The loss is sum(w_i * mse_i) / (instance rows of all workers), so a group of workers steps as one worker does.

    Raises:
        RayboothError: if the loss or the gradient is not finite.
    """
    device = data.mean.device
    module = RowLoss(family, loaded, diffusion, data, settings.text_encoder)
    module.trained.requires_grad_(True).train()
    # A list: a generator would be used up by the optimizer and leave nothing to clip.
    parameters = list(module.trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.autocast is torch.float16)
    model = parallel.wrap(module)
    seen = torch.zeros(4, device=device)  # sums since the last reading: loss, instance, prior, gradient norm
    read = 0
    for step in range(settings.steps):
        seen += _one_step(model, data, diffusion, settings, parallel, optimizer, scaler, parameters, step)
        metrics = None
        if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
            metrics = _read(seen, step + 1 - read, step + 1, parallel)
            seen, read = torch.zeros_like(seen), step + 1
        yield Step(step + 1, metrics)
    module.trained.eval().requires_grad_(False)


def _one_step(
    model: nn.Module, data: TrainingSet, diffusion: Diffusion, settings: Settings, parallel: Parallel,
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, parameters: list[nn.Parameter], step: int,
) -> Tensor:  # fmt: skip
    """One optimizer step. Returns this worker's share of (loss, instance, prior) and the gradient norm, unread."""
    device = data.mean.device
    every = rows_of_step(data, step, settings.batch, settings.seed)
    mine = range(parallel.rank, len(every), parallel.world)
    rows = torch.tensor([every[i] for i in mine], device=device)
    used = data.prompt[torch.tensor(every, device=device)].unique()
    x0, noise, t = _noised_rows(data, diffusion, settings.seed, step, mine, rows)
    autocast = torch.autocast(device.type, settings.autocast) if settings.autocast else nullcontext()
    with autocast:
        errors = model(rows, used, x0, noise, t)
    loss = prior_preserving(errors, data.weight[rows], settings.batch)
    # Wrapped modules average gradients over the workers; the loss is their sum.
    scaler.scale(loss * parallel.world).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, foreach=True)
    if scaler.is_enabled():  # an overflow is the scaler's business: it skips the step and lowers its scale
        norm = norm.nan_to_num(0, 0, 0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        instance = rows < data.instances
        parts = [loss.detach(), errors[instance].sum() / settings.batch, errors[~instance].sum() / settings.batch]
        return torch.stack([*parts, norm / parallel.world])


def _noised_rows(
    data: TrainingSet, diffusion: Diffusion, seed: int, step: int, places: Sequence[int], rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Posterior samples, noise and timesteps, each keyed by (seed, purpose, step, place of the row in the step)."""
    device, shape = data.mean.device, data.mean.shape[1:]
    posterior = torch.stack([normal(shape, seed, "posterior", step, i) for i in places]).to(device)
    noise = torch.stack([normal(shape, seed, "noise", step, i) for i in places]).to(device)
    t = [torch.randint(diffusion.timesteps, (1,), generator=generator(seed, "timestep", step, i)) for i in places]
    return data.mean[rows] + data.std[rows] * posterior, noise, torch.cat(t).to(device)


def _read(seen: Tensor, steps: int, step: int, parallel: Parallel) -> Metrics:
    loss, instance, prior, norm = (parallel.total(seen) / steps).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RayboothError(
            f"The loss is not finite at step {step}: lower finetune.lr, set finetune.precision = 'fp32', or look for a broken photograph in the contact sheet."
        )
    return Metrics(loss, instance, prior, norm)
