"""How weights are stepped: optimizers, learning rates over the run, moving averages, and bf16 weights that still move."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raybooth.errors import RayboothError
from raybooth.extras import missing
from raybooth.noise import generator
from raybooth.sections import RELATIVE

Groups = list[dict[str, Any]]


def make_optimizer(name: str, groups: Groups, weight_decay: float, seed: int) -> torch.optim.Optimizer:
    """One of torch's or an extra's optimizers over parameter groups that bring their own `lr`.

    With bf16 parameters "adamw" is AdamW with stochastic rounding.

    Raises:
        RayboothError: if its package is not installed, or bf16 weights are asked of another optimizer than adamw.
    """
    if any(p.dtype is torch.bfloat16 for g in groups for p in g["params"]):
        if name != "adamw":
            raise RayboothError(f"finetune.precision = 'bf16-weights' goes with finetune.optimizer = 'adamw', not '{name}'.")
        return StochasticAdamW(groups, weight_decay, seed)
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    if name == "adafactor":  # torch decays by its rate, which is `relative` times AdamW's: decay is to be as AdamW's
        return torch.optim.Adafactor([{**g, "weight_decay": weight_decay / g.get("relative", 1)} for g in groups])
    try:
        if name == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, weight_decay=weight_decay)
        from prodigyopt import Prodigy

        return Prodigy(groups, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True)
    except ImportError:
        raise missing("finetune.optimizer", name) from None


def groups_of(optimizer: str, parameters: Mapping[str, nn.Parameter], lr: Mapping[str, float]) -> Groups:
    """Parameter groups of the named `parameters`: one for each part in `lr`, of the names that begin with it, with its rate.

    For Adafactor, halves of adapters that do not start at zero are in groups of their own: what its rate is relative to is not small for them.
    """
    groups = []
    for part, rate in lr.items():
        own = {k: p for k, p in parameters.items() if k.startswith(f"{part}.")}
        drawn = {k for k in own if optimizer == "adafactor" and ".lora_A." in k}
        usual, of_weights = RELATIVE["lora" if drawn else "full"], RELATIVE["full"]
        groups.append({"params": [p for k, p in own.items() if k not in drawn], "lr": rate, "relative": usual})
        if drawn:
            groups.append({"params": [own[k] for k in own if k in drawn], "lr": rate * of_weights / usual, "relative": of_weights})
    return [group | {"peak": group["lr"]} for group in groups]


def state_like(name: str, p: Tensor) -> dict[str, Tensor]:
    """Tensors as the optimizer `name` holds them for `p`: torch's Adafactor, bitsandbytes' AdamW8bit (blocks of 256) and prodigyopt's Prodigy."""
    if name == "adamw8bit" and p.numel() >= 4096:
        moments = {k: torch.empty_like(p, dtype=torch.uint8) for k in ("state1", "state2")}
        return moments | {k: p.new_empty(-(-p.numel() // 256), dtype=torch.float32) for k in ("absmax1", "absmax2")}
    if name == "adafactor" and p.dim() > 1:
        return {"row_var": torch.empty_like(p[..., :1]), "col_var": torch.empty_like(p[..., :1, :])}
    names = {"adafactor": ("variance",), "adamw8bit": ("state1", "state2"), "prodigy": ("s", "p0", "exp_avg", "exp_avg_sq")}[name]
    return {k: torch.empty_like(p, dtype=torch.float32) for k in names}


def laid_out_like(p: Tensor, value: Tensor) -> Tensor:
    """A copy of an optimizer's `value` for a parameter, laid out in memory like the parameter (channels_last): fused kernels walk over both at once."""
    return torch.empty_like(p, dtype=value.dtype).copy_(value) if value.shape == p.shape else value.clone()


class Outline(torch.optim.Optimizer):
    """Takes the memory of an optimizer but moves nothing: for a plan, if that cannot step on tensors without data, or its package may be missing."""

    def __init__(self, name: str, groups: Groups):
        super().__init__(groups, {})
        self.name = name

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            if not self.state[p]:
                self.state[p].update(state_like(self.name, p))
            torch.empty_like(p)  # an update, before it is added


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rate at `step` (from 0): a linear warm-up, then constant, cosine or linear to zero."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[schedule]


class Average:
    """Exponential moving average of parameters in float32; a young one forgets faster: min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = {k: p.detach().float().clone() for k, p in parameters.items()}

    def update(self, step: int) -> None:
        """Update the averages after optimizer step number `step`, counted from 1."""
        keep = min(self.decay, (1 + step) / (10 + step))
        plain = [k for k, p in self.parameters.items() if p.dtype == torch.float32]
        if plain:
            torch._foreach_lerp_([self.values[k] for k in plain], [self.parameters[k].detach() for k in plain], 1 - keep)
        for k in self.parameters.keys() - plain:  # one by one: bf16 weights are there to save the memory that float32 copies of all would take
            self.values[k].lerp_(self.parameters[k].detach().float(), 1 - keep)

    def apply(self) -> None:
        for k, p in self.parameters.items():
            p.data.copy_(self.values[k])


def round_stochastically(x: Tensor, random: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the probability that keeps the mean: 16 random bits added below, then cut off."""
    bits = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=random)
    return ((x.contiguous().view(torch.int32) + bits) & -(1 << 16)).view(torch.float32).bfloat16()


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) over bf16 weights and moments, computed in float32 and rounded stochastically.

    Rounded to nearest, an update below half a bf16 step of its weight is lost every time; this way, it takes effect in proportion.
    """

    def __init__(self, groups: Iterable[Any], weight_decay: float, seed: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(groups, dict(weight_decay=weight_decay, betas=betas, eps=eps))
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    self._step_one(p, group, (g, i))

    def _step_one(self, p: Tensor, group: dict[str, Any], place: tuple[int, int]) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        n, (beta1, beta2) = state["step"], group["betas"]
        random = torch.Generator(p.device).manual_seed(generator(self.seed, "rounding", n, *place).initial_seed())
        gradient = p.grad.float()  # type: ignore[union-attr]
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp_(gradient.square(), 1 - beta2)
        update = (mean / (1 - beta1**n)) / ((square / (1 - beta2**n)).sqrt() + group["eps"])
        weight = p.float() * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
        for target, value in ((p, weight), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            target.copy_(round_stochastically(value, random))
