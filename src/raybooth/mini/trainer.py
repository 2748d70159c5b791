"""One resumable training loop for all of mini's networks."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LossFn = Callable[[int], Tensor]


def learning_rate(step: int, steps: int, peak: float, decay: float = 0.3, warmup: int = 50) -> float:
    """The learning rate of a step: warm-up, a plateau, then linear decay over the last `decay` of the steps, so that a longer run shares the plateau."""
    down = (steps - step) / (decay * steps)
    return peak * min(1.0, (step + 1) / warmup, down)


class Trainer:
    """Trains `net` on `loss(step)`; keeps an exponential moving average; writes a checkpoint and goes on from it.

    `loss` must draw all its randomness from `step`, so that a stopped run ends where an unbroken one does. `muon` is the learning rate of
    convolutions by Muon (Jordan et al. 2024; torch 2.9 and later), 0 for AdamW throughout. `bf16` is autocast for the loss.
    """

    def __init__(
        self, name: str, net: nn.Module, loss: LossFn, *,
        steps: int, lr: float, folder: Path, decay: float = 0.3, ema: float = 0.998, muon: float = 0.0, bf16: bool = False,
    ):  # fmt: skip
        self.name, self.net, self.loss, self.steps, self.decay, self.ema, self.bf16 = name, net, loss, steps, decay, ema, bf16
        self.path = folder / f"{name}.checkpoint.safetensors"
        self.log = folder / f"{name}.jsonl"
        self.params = {k: p for k, p in net.named_parameters() if p.requires_grad}
        # Muon is for matrices: it gets views of the kernels, through which it changes the kernels themselves.
        self.matrices = {k: nn.Parameter(p.detach().flatten(1)) for k, p in self.params.items() if muon and p.ndim == 4 and p.shape[0] >= 16}
        others = [p for k, p in self.params.items() if k not in self.matrices]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [(torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True), lr)]
        if self.matrices:
            self.optimizers.append((torch.optim.Muon(self.matrices.values(), weight_decay=0.01), muon))
        self.average = {k: p.detach().clone() for k, p in self.params.items()}
        self.step = 0
        if self.path.exists():
            self._load()

    def run(self, checkpoint_every: int = 100, log_every: int = 20) -> None:
        began, first, losses = time.monotonic(), self.step, []
        self.net.train()
        while self.step < self.steps:
            losses.append(self._one_step())
            if self.step % log_every == 0:
                rate = (self.step - first) / (time.monotonic() - began)
                row = {"step": self.step, "loss": sum(losses) / len(losses), "steps_per_s": round(rate, 3)}
                losses = []
                with self.log.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                left = (self.steps - self.step) / rate / 60
                print(f"{self.name} {self.step}/{self.steps} loss {row['loss']:.4f}, {rate:.2f} steps/s, {left:.0f} min left", flush=True)
            if self.step % checkpoint_every == 0 or self.step == self.steps:
                self.save()
        self.use_average()

    def _one_step(self) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        for k, matrix in self.matrices.items():
            gradient = self.params[k].grad
            assert gradient is not None
            matrix.grad = gradient.flatten(1)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.steps, peak, self.decay)
            optimizer.step()
        self.net.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.params.values()], 1 - keep)
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"{self.name}: the loss is {value} at step {self.step}; lower the learning rate and run again")
        return value

    def use_average(self) -> None:
        for k, p in self.params.items():
            p.data.copy_(self.average[k])
        self.net.eval().requires_grad_(False)

    def save(self) -> None:
        tensors = {f"net.{k}": p.detach() for k, p in self.params.items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for k, state in self._states().items():
            tensors |= {f"optimizer.{k}.{s}": v for s, v in state.items()}
        new = self.path.with_suffix(".new")
        save_file({k: v.contiguous() for k, v in tensors.items()}, new, {"step": str(self.step)})
        os.replace(new, self.path)

    def _load(self) -> None:
        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as f:
            self.step = int(f.metadata()["step"])
        for k, p in self.params.items():
            p.data.copy_(tensors[f"net.{k}"])
            self.average[k].copy_(tensors[f"average.{k}"])
        for k, state in self._states().items():
            state |= {name.rpartition(".")[2]: v for name, v in tensors.items() if name.startswith(f"optimizer.{k}.")}

    def _states(self) -> dict[str, dict[str, Tensor]]:
        """The optimizers' state of each parameter, by its name."""
        of = {id(p): o.state[p] for o, _ in self.optimizers for group in o.param_groups for p in group["params"]}
        return {k: of[id(self.matrices.get(k, p))] for k, p in self.params.items()}
