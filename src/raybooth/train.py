"""fit(): the only training loop, a generator that yields after each optimizer step.

Whoever drives it (Ray, a test, a notebook) adds reporting, checkpoints and stopping from outside.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raybooth.dataset import TrainingSet, dealt, noised_rows, rows_of_step
from raybooth.dropout import key_dropout
from raybooth.errors import RayboothError
from raybooth.families import Family, Loaded
from raybooth.loss import prior_preserving, row_errors
from raybooth.noise import reseeded, to_device
from raybooth.optim import Average, groups_of, laid_out_like, learning_rate_factor, make_optimizer
from raybooth.sections import Finetune
from raybooth.teacher import Teacher

VALIDATION = 8  # draws of each kind of row
Words = dict[str, Tensor]
"""What the denoiser is told of prompts: their conditioning, one row each."""


@dataclass(frozen=True)
class Settings:
    """What fit() needs to know besides model and rows. `finetune.batch` counts instance rows over all workers; `autocast` is what "auto" stands for here."""

    finetune: Finetune
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
    lr: float


@dataclass(frozen=True)
class State:
    """All that fit() needs to go on after `step` as if it had never stopped. No random state: there is none."""

    step: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One completed optimizer step. `metrics` is there on every `log_every`-th and on the last.

    `state` reads what a checkpoint holds; every worker of the group must call it, or none. `validate` gives the mean losses of fixed rows at
    fixed noise and timesteps, by kind: what training does to the loss, without the noise of the draws. Any worker may call it.
    """

    number: int
    metrics: Metrics | None
    state: Callable[[], State]
    validate: Callable[[], dict[str, float]]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """The context of a forward pass, in `dtype` if given; the backward pass takes its types from there."""
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


class RowLoss(nn.Module):
    """The trained modules and their loss as one module, so that data parallelism can wrap them together."""

    def __init__(self, family: Family, loaded: Loaded, data: TrainingSet, settings: Settings):
        super().__init__()
        self.family, self.loaded, self.objective, self.data = family, loaded, loaded.objective.to(data.mean.device), data
        self.text_encoder, self.min_snr_gamma = settings.finetune.text_encoder, settings.finetune.min_snr_gamma
        self.trained = nn.ModuleDict({name: loaded.modules[name] for name in family.trainable(self.text_encoder)})
        self.teacher = Teacher(family, loaded, self.trained, settings.autocast) if data.teacher and data.instances < len(data.prompt) else None
        if self.teacher:
            self.taught = sorted({*data.prompt[data.instances :]})
            with self.teacher.asked(), autocast(data.mean.device, settings.autocast):
                self.taught_by = self.encode(self.taught)  # the base model's words do not change

    def forward(
        self, instances: int, prompt: Sequence[int], used: Sequence[int], x0: Tensor, noise: Tensor, t: Tensor, words: Words | None = None
    ) -> Tensor:  # fmt: skip
        """Weighted squared error of each row: the first `instances` are of the subject, the others of the class.

        `prompt` is each row's; `used` are those of all workers' rows in this step, each once, and `words` their conditioning if encoded before.
        """
        z, target, taught = self.objective.noisy(x0, noise, t), self.objective.target(x0, noise, t), prompt[instances:]
        if self.teacher and taught:
            said = self.teacher.predict(z[instances:], t[instances:], self._of_rows(taught, self.taught, self.taught_by))
            target = torch.cat([target[:instances], said.to(target.dtype)])
        prediction = self.family.predict(self.loaded, z, t, self._of_rows(prompt, used, words or self.encode(used)))
        return row_errors(prediction, target) * self.objective.weight(t, self.min_snr_gamma)

    def encode(self, used: Sequence[int]) -> Words:
        """The conditioning of these prompts, one row each; by the text encoders if they are trained."""
        known = self.data.conditioning
        known = {k: v[self._at(used)] for k, v in known.items()} if known else None
        if not self.text_encoder:
            assert known is not None
            return known
        return self.family.encode_text(self.loaded, [self.data.prompts[i] for i in used], known)

    def _of_rows(self, prompt: Sequence[int], used: Sequence[int], words: Words) -> Words:
        return {k: v[self._at(used.index(p) for p in prompt)] for k, v in words.items()}

    def _at(self, places: Iterable[int]) -> Tensor:
        return to_device(torch.tensor([*places]), self.data.mean.device)


def fit(
    family: Family, loaded: Loaded, data: TrainingSet, settings: Settings, parallel: Parallel = Parallel(), start: State | None = None
) -> Iterator[Step]:  # fmt: skip
    """Fine-tune `loaded` in place by the prior-preserving loss, from the beginning or from `start`.

    In parts where some parameters require gradients already (adapters) only those are trained; other parts are trained whole.
    The loss is sum(w_i * mse_i) / (instance rows of all workers), so a group of workers steps as one worker does.
    `start` is released when it has been read, as it is as large as what is trained: release it too.

    Raises:
        RayboothError: if the loss, the gradient or a weight is not finite.
    """
    loop = _Loop(RowLoss(family, loaded, data, settings), settings, parallel)
    if start:
        loop.restore(start)
    start = None
    while loop.done < settings.finetune.steps:
        loop.step()
        last = loop.done == settings.finetune.steps
        metrics = loop.read() if last or loop.done % settings.finetune.log_every == 0 else None
        yield Step(loop.done, metrics, loop.state, loop.validate)
    loop.finish()


class _Loop:
    """What one worker holds while it fine-tunes."""

    def __init__(self, module: RowLoss, settings: Settings, parallel: Parallel):
        self.data, self.objective, self.parallel = module.data, module.objective, parallel
        self.finetune, self.seed, self.autocast = settings.finetune, settings.seed, settings.autocast
        self.device = self.data.mean.device
        self.trained = module.trained.train()
        for part in self.trained.values():
            if not any(p.requires_grad for p in part.parameters()):
                part.requires_grad_(True)
        # Held as a dictionary: a generator would be used up by the optimizer and leave nothing to clip.
        self.parameters = {k: p for k, p in self.trained.named_parameters() if p.requires_grad}
        finetune = self.finetune
        of_encoders = finetune.lr if finetune.text_encoder_lr is None else finetune.text_encoder_lr
        rates = {part: finetune.lr if part == module.family.denoiser else of_encoders for part in self.trained}
        groups = groups_of(finetune.optimizer, self.parameters, rates)
        # Scaled gradients are rounded, in bfloat16 by up to half a 128th: the bound is to hold after that too.
        self.bound = finetune.max_grad_norm * (1 - max(torch.finfo(p.dtype).eps for p in self.parameters.values()) / 2)
        self.optimizer = make_optimizer(finetune.optimizer, groups, finetune.weight_decay, self.seed)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16)
        self.average = Average(self.parameters, finetune.ema) if finetune.ema else None
        self.keys = {part: key_dropout(trained) for part, trained in self.trained.items()}
        self.module, self.model = module, parallel.wrap(module)
        self.done = self.read_at = 0
        self.seen = torch.zeros(4, device=self.device)  # sums since the last reading: loss, instance, prior, gradient norm

    def step(self) -> None:
        """Take one optimizer step, on this worker's share of the rows."""
        finetune, seed, step = self.finetune, self.seed, self.done
        every = rows_of_step(self.data, step, finetune.batch, seed)
        used = sorted({self.data.prompt[row] for row in every})
        passes = dealt(len(every), self.parallel.rank, self.parallel.world, finetune.accumulate)
        for part, keys in self.keys.items():
            keys[:] = [(seed, "dropout", step, part, prompt) for prompt in used]  # the denoiser's are by rows: each pass sets them
        with reseeded(self.device, seed, "dropout", step, self.parallel.rank):  # for the little that libraries drop by themselves
            self._passes(every, passes, used)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(finetune.schedule, step, finetune.steps, finetune.warmup)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip(self.bound)
        if self.scaler.is_enabled():  # an overflow is the scaler's business: it skips the step and lowers its scale
            norm = norm.nan_to_num(0, 0, 0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.seen[3] += norm.detach() / self.parallel.world
        self.done += 1
        if self.average:
            self.average.update(self.done)

    def _clip(self, bound: float) -> Tensor:
        """Clip the gradients as torch's clip_grad_norm_ does; returns the norm before, in float32: bfloat16 would round it, perhaps to the bound."""
        norms = torch._foreach_norm([p.grad for p in self.parameters.values() if p.grad is not None], 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        # Below the bound it multiplies by one. A CPU can be asked for that without waiting; a GPU cannot.
        if self.device.type != "cpu" or norm > bound:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), bound, norm, foreach=True)
        return norm

    def _passes(self, every: list[int], passes: Sequence[Sequence[int]], used: list[int]) -> None:
        """Forward and backward over this worker's places in the step, one pass after the other. A trained text encoder runs once for all of
        them: they use copies of its output, except the last, which takes the gradients of the copies back to it.
        """
        words, copies = None, None
        if len(passes) > 1 and self.finetune.text_encoder:
            with autocast(self.device, self.autocast):
                words = self.module.encode(used)
            copies = {k: v.detach().requires_grad_(v.requires_grad) for k, v in words.items()}
        for places in passes[:-1]:
            # Gradients are exchanged once a step.
            with self.model.no_sync() if isinstance(self.model, nn.parallel.DistributedDataParallel) else nullcontext():
                self._backward(every, places, used, copies)
        owed = [(v.float() * g.float()).sum() for k, v in (words or {}).items() if copies and (g := copies[k].grad) is not None]
        self._backward(every, passes[-1], used, words, owed)

    def _backward(self, every: list[int], places: Sequence[int], used: list[int], words: Words | None, owed: Sequence[Tensor] = ()) -> None:
        finetune, data = self.finetune, self.data
        mine, instances = [every[i] for i in places], sum(i < finetune.batch for i in places)
        rows = to_device(torch.tensor(mine), self.device)
        x0, noise, t = noised_rows(data, self.objective, self.seed, finetune.noise_offset, self.done, places, rows)
        self.keys[self.module.family.denoiser][:] = [(self.seed, "dropout", self.done, place) for place in places]
        with autocast(self.device, self.autocast):
            errors = self.model(instances, [data.prompt[row] for row in mine], used, x0, noise, t, words)
            loss = prior_preserving(errors, data.weight[rows], finetune.batch)
        # Wrapped modules average gradients over the workers; the loss is their sum.
        sum(owed, self.scaler.scale(loss * self.parallel.world)).backward()
        with torch.no_grad():
            self.seen[:3] += torch.stack([loss, *(kind.sum() / finetune.batch for kind in (errors[:instances], errors[instances:]))])

    def read(self) -> Metrics:
        """The means since the last reading, over all workers; the one place where the step waits for its numbers."""
        loss, instance, prior, norm = (self.parallel.total(self.seen) / (self.done - self.read_at)).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._broken("loss is")
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:  # halved at every step that it has skipped: none of them has learnt anything
            raise RayboothError(
                f"Gradients have overflowed float16 in every step of late, up to step {self.done}: set finetune.precision = 'bf16', or 'fp32', "
                "with which the fine-tuning begins anew, or lower finetune.lr."
            )
        self.seen, self.read_at = torch.zeros_like(self.seen), self.done
        return Metrics(loss, instance, prior, norm, self.optimizer.param_groups[0]["lr"])

    def _broken(self, what: str) -> RayboothError:
        return RayboothError(
            f"The {what} not finite at step {self.done}: lower finetune.lr, set finetune.precision = 'fp32', or look for a broken photograph "
            "in the contact sheet. Checkpoints are from before, but of these settings and photographs: with others the fine-tuning begins anew."
        )

    def _check_weights(self) -> None:
        """Refuse weights that are not finite: the last update may have broken them, and the loss and the gradients are from before it."""
        norms = torch._foreach_norm([p.detach() for p in self.parameters.values()], torch.inf)
        if not torch.stack(norms).isfinite().all():
            raise self._broken("weights are")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses of fixed rows at fixed noise, by kind; in passes of a step's own shape, which the device is warm for."""
        data, finetune = self.data, self.finetune
        kinds = {"instance": range(data.instances), "prior": range(data.instances, len(data.weight))}
        kinds = {kind: among for kind, among in kinds.items() if among}
        share, errors = max(1, finetune.batch // (finetune.accumulate * self.parallel.world)), []
        self.trained.eval()
        try:
            for i in range(0, VALIDATION, share):
                places = range(i, min(i + share, VALIDATION))
                chosen = [among[k % len(among)] for among in kinds.values() for k in places]
                rows = to_device(torch.tensor(chosen), self.device)
                # Step -1, before the first: no step of the training draws the same.
                drawn = noised_rows(data, self.objective, self.seed, finetune.noise_offset, -1, [*places] * len(kinds), rows)
                with autocast(self.device, self.autocast):
                    prompt = [data.prompt[row] for row in chosen]
                    errors.append(self.module(len(places), prompt, sorted({*prompt}), *drawn).view(len(kinds), -1))
        finally:
            self.trained.train()
        return {f"validation_{kind}": mean for kind, mean in zip(kinds, torch.cat(errors, 1).mean(1).tolist(), strict=True)}

    def state(self) -> State:
        """The state at the present step. The sums since the last reading are those of all workers.

        Raises:
            RayboothError: if it is not finite: a broken state must not replace a good one.
        """
        seen = self.parallel.total(self.seen.clone())
        if not seen.isfinite().all():
            self.read()
        self._check_weights()
        tensors = {f"weights.{k}": p.detach() for k, p in self.parameters.items()}
        tensors["seen"] = seen
        if self.average:
            tensors |= {f"average.{k}": v for k, v in self.average.values.items()}
        numbers: dict[str, dict[str, Any]] = {}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():  # as it is: in state_dict() bitsandbytes wraps its own once more
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        groups = [{k: v for k, v in g.items() if isinstance(v, (int, float))} for g in self.optimizer.param_groups]
        return State(self.done, tensors, {"read_at": self.read_at, "groups": groups, "numbers": numbers, "scaler": self.scaler.state_dict()})

    @torch.no_grad()
    def restore(self, state: State) -> None:
        self.done, self.read_at = state.step, state.scalars["read_at"]
        self.seen.copy_(state.tensors["seen"] if self.parallel.rank == 0 else torch.zeros_like(self.seen))
        held = self.optimizer.state_dict()
        own_groups = zip(self.optimizer.param_groups, held["param_groups"], strict=True)
        place = {p: i for own, saved in own_groups for p, i in zip(own["params"], saved["params"], strict=True)}  # groups need not be in the parameters' order
        for name, p in self.parameters.items():
            p.copy_(state.tensors[f"weights.{name}"])
            if self.average:
                self.average.values[name].copy_(state.tensors[f"average.{name}"])
            prefix = f"optimizer.{name}."
            own = {k.removeprefix(prefix): laid_out_like(p, v) for k, v in state.tensors.items() if k.startswith(prefix)}
            held["state"][place[p]] = own | state.scalars["numbers"].get(name, {})
        for group, kept in zip(held["param_groups"], state.scalars["groups"], strict=True):
            group.update(kept)
        self.optimizer.load_state_dict(held)
        if state.scalars["scaler"]:  # empty where the run began without one: precision 'auto' differs between devices
            self.scaler.load_state_dict(state.scalars["scaler"])

    def finish(self) -> None:
        self._check_weights()
        if self.average:
            self.average.apply()
        self.trained.eval().requires_grad_(False)
