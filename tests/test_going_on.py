"""What a training leaves for the next, and what it must not leave."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from test_train import PLAIN, changed, data, readied, trained

from raybooth.checkpoint import Checkpoints
from raybooth.errors import RayboothError
from raybooth.families import family_of
from raybooth.families.lora import add_adapters
from raybooth.families.parts import load
from raybooth.sections import Finetune, Lora
from raybooth.train import Metrics, State, fit
from raybooth.workspace import Workspace


def test_a_loss_that_is_not_finite_stops_with_a_sentence(toy: Path):
    rows = data()
    rows.mean[0, 0, 0, 0] = float("nan")
    with pytest.raises(RayboothError, match=r"not finite at step 1: .* with others the fine-tuning begins anew"):
        trained(toy, rows=rows)


@pytest.mark.parametrize(
    ("more", "how"),
    [
        ({}, PLAIN), ({"autocast": torch.bfloat16}, PLAIN), ({"ema": 0.9, "schedule": "cosine", "warmup": 2}, PLAIN),
        ({"optimizer": "adafactor", "accumulate": 2}, PLAIN),
        ({"ema": 0.9}, Finetune(channels_last=True)),
    ],
    ids=["plain", "bf16", "average, cosine", "adafactor", "channels last"],
)  # fmt: skip
def test_a_run_that_goes_on_ends_in_the_same_bits(toy: Path, tmp_path: Path, more: dict, how: Finetune):
    """Through a checkpoint on disk, written at step 3 and read in another loop."""
    settings = changed(steps=5, log_every=2, **more)
    whole, steps = trained(toy, settings, how=how)
    kept = Checkpoints(Workspace(str(tmp_path)), "a" * 64, keep=1)
    for step in fit(family_of(toy), readied(toy, how), data(), settings):
        if step.number == 3:
            kept.save(step.state())
            kept.wait()
            break
    start, notes = kept.newest()
    assert start is not None
    assert (start.step, notes) == (3, [])
    again, rest = trained(toy, settings, how=how, start=start)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert [s.metrics for s in rest] == [s.metrics for s in steps[3:]]


@pytest.mark.parametrize(("before", "after"), [(None, torch.float16), (torch.float16, None)], ids=["to a scaler", "from a scaler"])
def test_a_run_goes_on_where_the_loss_is_scaled_otherwise(toy: Path, before: torch.dtype | None, after: torch.dtype | None):
    """finetune.precision = 'auto' on another device."""
    half = next(fit(family_of(toy), readied(toy, PLAIN), data(), changed(autocast=before))).state()
    _, rest = trained(toy, changed(steps=2, autocast=after), start=half)
    assert [s.number for s in rest] == [2]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_adapters_go_on_with_their_own_optimizer_states(toy: Path, optimizer: str):
    """Adafactor has the halves of adapters in groups of their own, in another order than the parameters."""
    how = Finetune(method="lora", optimizer=optimizer)
    settings = changed(steps=4, optimizer=optimizer)
    whole, _ = trained(toy, settings, how=how)
    run = fit(family_of(toy), readied(toy, how), data(), settings)
    half = copy.deepcopy(next(step for step in run if step.number == 2).state())
    again, _ = trained(toy, settings, how=how, start=half)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_dropout_is_the_same_after_a_restart_and_leaves_the_random_state_alone(toy: Path):
    settings = changed(steps=4)

    def adapted(start: State | None = None, stop: int = 4) -> tuple[dict[str, torch.Tensor], State]:
        torch.manual_seed(stop)
        before = torch.random.get_rng_state()
        family = family_of(toy)
        loaded = load(family, toy, ("unet", "text_encoder"))
        add_adapters(family, loaded, family.trainable(True), Lora(rank=4, dropout=0.5), seed=0)
        run = fit(family, loaded, data(), settings, start=start)
        state = next(step for step in run if step.number == stop).state()
        assert torch.equal(torch.random.get_rng_state(), before)
        return {k: v.clone() for k, v in state.tensors.items() if k.startswith("weights.")}, copy.deepcopy(state)

    whole, _ = adapted()
    _, half = adapted(stop=2)
    again, _ = adapted(start=half)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_broken_state_never_becomes_a_checkpoint(toy: Path):
    family, rows = family_of(toy), data()
    rows.mean[:] = float("nan")
    steps = fit(family, load(family, toy, ("unet", "text_encoder")), rows, changed(log_every=100))
    with pytest.raises(RayboothError, match="not finite at step 1"):
        next(steps).state()


@pytest.mark.parametrize("every", [True, False], ids=["kept", "saved"])
def test_weights_that_the_last_update_breaks_are_neither_kept_nor_saved(toy: Path, every: bool):
    """The loss and the gradients of that step are fine."""
    steps = fit(family_of(toy), readied(toy, PLAIN), data(), changed(steps=1, log_every=1, lr=1e38))
    with pytest.raises(RayboothError, match=r"weights are not finite at step 1: lower finetune\.lr"):
        _ = [step.state() for step in steps] if every else list(steps)


def test_gradients_that_overflow_at_every_step_do_not_pass_for_learning(toy: Path):
    """The scaler skips such steps and halves its scale, while the losses look as ever."""
    loaded = readied(toy, PLAIN)
    loaded.modules["unet"].conv_in.weight.register_hook(lambda grad: grad * float("nan"))
    steps = fit(family_of(toy), loaded, data(), changed(steps=40, log_every=5, autocast=torch.float16))
    with pytest.raises(RayboothError, match="overflowed float16 in every step"):
        list(steps)


def test_a_teacher_drops_nothing_of_a_base_that_drops_by_itself(toy: Path):
    """Under LoRA it is the model in training, whose masks are for all rows of the pass, asked for some of them."""

    def taught() -> list[Metrics | None]:
        loaded = readied(toy, Finetune(method="lora", text_encoder=False))
        for block in loaded.modules["unet"].modules():
            if isinstance(block, ResnetBlock2D):
                block.dropout = torch.nn.Dropout(p)
        rows = replace(data(weight=2), teacher=True, conditioning={"text": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))})
        return [step.metrics for step in fit(family_of(toy), loaded, rows, changed(steps=1, log_every=1, text_encoder=False, lr=1e-30))]

    p = 0.5
    [dropped] = taught()
    p = 0.0
    [whole] = taught()
    assert dropped is not None
    assert whole is not None
    assert whole.prior < 1e-9  # untrained adapters say what the base says
    assert dropped.prior > 1e-4  # the dropout is the student's alone
