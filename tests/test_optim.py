"""Optimizers, schedules, averages, rounding: against their definitions."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from raybooth.errors import RayboothError
from raybooth.optim import Average, StochasticAdamW, groups_of, learning_rate_factor, make_optimizer, round_stochastically, state_like
from raybooth.sections import Finetune


def test_the_schedules_warm_up_and_end_where_they_should():
    for schedule, end in (("constant", 1.0), ("cosine", 0.0), ("linear", 0.0)):
        factors = [learning_rate_factor(schedule, s, 100, 10) for s in range(100)]
        assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
        assert factors[10] == 1.0
        assert factors[-1] == pytest.approx(end, abs=0.02)
    assert learning_rate_factor("cosine", 55, 100, 10) == pytest.approx(0.5)
    assert learning_rate_factor("linear", 55, 100, 10) == pytest.approx(0.5)


def test_rounding_keeps_the_mean_and_is_one_of_the_two_neighbours():
    x = torch.full((200_000,), 1 + 0.3 / 128)  # three tenths of the way between two bf16 numbers
    rounded = round_stochastically(x, torch.Generator().manual_seed(0)).float()
    assert sorted(rounded.unique().tolist()) == [1.0, 1 + 1 / 128]
    assert (rounded > 1).float().mean().item() == pytest.approx(0.3, abs=0.01)
    exact = torch.tensor([0.0, -2.0, 0.5])
    assert torch.equal(round_stochastically(exact, torch.Generator().manual_seed(0)).float(), exact)


def test_the_stochastic_optimizer_is_adamw_on_average():
    """A thousand copies of one weight: their mean follows torch's AdamW in float32."""
    theirs, ours = nn.Parameter(torch.full((1,), 0.7)), nn.Parameter(torch.full((4000,), 0.7).bfloat16())
    start = float(ours[0])
    theirs.data.fill_(start)
    reference = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1)
    mine = StochasticAdamW([{"params": [ours], "lr": 1e-3}], 0.1, 0)
    for step in range(20):
        gradient = math.sin(step) + 0.2
        theirs.grad, ours.grad = torch.full((1,), gradient), torch.full((4000,), gradient).bfloat16()
        reference.step()
        mine.step()
    assert float(ours.float().mean()) - start == pytest.approx(float(theirs) - start, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_the_recursion(dtype: torch.dtype):
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    average, expected = Average({"p": p}, 0.9), torch.zeros(3)
    for step in range(1, 30):
        p.data.fill_(step)
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
        average.update(step)
    assert torch.allclose(average.values["p"], expected)
    average.apply()
    assert torch.allclose(p.detach().float(), expected, rtol=0.005 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy"])
def test_an_optimizer_that_is_not_installed_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch):
    for module in ("bitsandbytes", "bitsandbytes.optim", "prodigyopt"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(RayboothError, match=rf"pip install 'raybooth\[{name}\]'"):
        make_optimizer(name, [{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}], 0.0, 0)


@pytest.mark.parametrize("adapter", [False, True])
def test_adafactor_steps_as_far_as_adamw_by_default(adapter: bool):
    """At AdamW's own rate it would take a fortieth of its steps, and of an adapter's half that starts at zero a thousandth."""

    def moved(name: str, lr: float) -> float:
        torch.manual_seed(0)
        weights = torch.zeros(64, 64) if adapter else torch.randn(64, 64) * 0.025
        p, before, wanted = nn.Parameter(weights.clone()), weights, torch.randn(64, 64)
        optimizer = make_optimizer(name, [{"params": [p], "lr": lr}], 0.0, 0)
        for _ in range(50):
            (p - wanted).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return float((p.detach() - before).square().mean().sqrt())

    method: Any = "lora" if adapter else "full"
    usual, own = Finetune(method=method).lr, Finetune(method=method, optimizer="adafactor").lr
    assert 0.3 < moved("adafactor", own) / moved("adamw", usual) < 3
    assert moved("adafactor", usual) < 0.1 * moved("adamw", usual)


def test_adafactor_decays_as_adamw_and_moves_an_adapters_first_half_as_far():
    """Its rate is relative to the size of what it moves, its decay is not; and the half that does not start at zero is as large as weights are."""

    def stepped(name: str, decay: float, still: bool) -> dict[str, float]:
        torch.manual_seed(0)
        halves = {"unet.x.lora_A.weight": nn.Parameter(torch.randn(4, 64) * 0.1), "unet.x.lora_B.weight": nn.Parameter(torch.zeros(64, 4))}
        before = {k: p.detach().clone() for k, p in halves.items()}
        rate = Finetune(method="lora", optimizer=name).lr  # type: ignore[arg-type]
        optimizer = make_optimizer(name, groups_of(name, halves, {"unet": rate}), decay, 0)
        for p in halves.values():
            p.grad = torch.zeros_like(p) if still else torch.randn_like(p)
        optimizer.step()
        if still:
            return {k: float(1 - p.detach().norm() / before[k].norm()) for k, p in halves.items() if before[k].any()}
        return {k: float((p.detach() - before[k]).square().mean().sqrt()) for k, p in halves.items()}

    for k, size in stepped("adamw", 0.0, still=False).items():
        assert 0.2 < stepped("adafactor", 0.0, still=False)[k] / size < 5
    for k, gone in stepped("adamw", 10.0, still=True).items():
        assert stepped("adafactor", 10.0, still=True)[k] == pytest.approx(gone, rel=0.02)


def test_the_state_of_a_plan_is_what_adafactor_holds():
    """Of matrices, convolutions and vectors; the other two are known from their packages alone."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((40, 30), (8, 6, 3, 3), (50,))]
    optimizer = make_optimizer("adafactor", [{"params": parameters, "lr": 1e-3}], 0.0, 0)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in parameters:
        held = {k: v.shape for k, v in optimizer.state[p].items() if k != "step"}
        assert {k: v.shape for k, v in state_like("adafactor", p).items()} == held


def test_an_8_bit_state_has_a_byte_a_moment_and_a_scale_a_block():
    sizes = {n: sum(t.numel() * t.element_size() for t in state_like("adamw8bit", torch.empty(n)).values()) for n in (4095, 4096, 1 << 20)}
    assert sizes == {4095: 8 * 4095, 4096: 2 * 4096 + 2 * 16 * 4, 1 << 20: (2 << 20) + 2 * 4096 * 4}
