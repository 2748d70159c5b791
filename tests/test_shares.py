"""However the rows are dealt to workers and to passes, a step is the same."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import ALONE, changed, data, trained

from raybooth.dropout import RowDropout
from raybooth.families import Loaded, family_of
from raybooth.families.parts import load
from raybooth.method import make_ready
from raybooth.sections import Finetune, Lora
from raybooth.train import Parallel, Settings, fit


def test_accumulated_passes_are_one_batch(toy: Path):
    whole, steps = trained(toy, changed(batch=3))
    split, same = trained(toy, changed(batch=3, accumulate=3))
    assert [s.metrics.loss for s in same] == pytest.approx([s.metrics.loss for s in steps], rel=1e-5)
    assert all((split[k] - whole[k]).abs().float().mean() < 2e-5 for k in whole)


def _keep(seen: list[torch.Tensor], gradient: torch.Tensor) -> None:
    seen.append(gradient.clone())


def test_shares_of_two_workers_are_one_workers_gradient(toy: Path):
    """Each worker's loss is its share of the whole: the gradients of all shares add up to one worker's."""
    family = family_of(toy)
    rows = data()
    gradients: dict[tuple[int, int], list[torch.Tensor]] = {}
    for world in (1, 2):
        for rank in range(world):
            loaded = load(family, toy, ("unet", "text_encoder"))
            seen: list[torch.Tensor] = []

            def keep(module, seen=seen):
                for p in module.trained.parameters():
                    p.register_hook(partial(_keep, seen))
                return module

            # The loss is multiplied by the world's size for wrappers that average; one step, no clipping.
            one = changed(steps=1, max_grad_norm=1e9)
            list(fit(family, loaded, rows, one, Parallel(rank, world, wrap=keep)))
            gradients[world, rank] = [g / world for g in seen]
    whole = torch.stack([g.norm() for g in gradients[1, 0]]).norm()
    shared = [a + b for a, b in zip(gradients[2, 0], gradients[2, 1], strict=True)]
    apart = torch.stack([(a - b).norm() for a, b in zip(gradients[1, 0], shared, strict=True)]).norm()
    assert apart < 1e-5 * whole


def with_dropout(toy: Path, p: float = 0.4, **how: bool) -> Loaded:
    family = family_of(toy)
    loaded = load(family, toy, family.trainable(True))
    make_ready(family, loaded, Finetune(method="lora", **how), Lora(rank=4, dropout=p), 0)
    for module in loaded.modules.values():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:  # nought at first, and what is dropped before it would not be seen
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return loaded


def gradients(toy: Path, loaded: Loaded, settings: Settings, parallel: Parallel = ALONE) -> torch.Tensor:
    """Of one step, unclipped."""
    seen: dict[str, torch.Tensor] = {}

    def keep(module: Any) -> Any:
        for name, parameter in module.trained.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
        return module

    list(fit(family_of(toy), loaded, data(), settings, replace(parallel, wrap=keep)))
    return torch.cat([seen[k].flatten() for k in sorted(seen)]) / parallel.world


ONE_STEP = changed(steps=1, batch=3, max_grad_norm=1e9)


def test_what_is_dropped_of_a_row_is_its_own(toy: Path):
    """By two workers, in three passes, and computed again: what one worker drops in one pass."""
    whole = gradients(toy, with_dropout(toy), ONE_STEP)
    dealt = {
        "two workers": sum(gradients(toy, with_dropout(toy), ONE_STEP, Parallel(rank, 2)) for rank in range(2)),
        "three passes": gradients(toy, with_dropout(toy), changed(steps=1, batch=3, max_grad_norm=1e9, accumulate=3)),
        "computed again": gradients(toy, with_dropout(toy, gradient_checkpointing=True), ONE_STEP),
    }
    for how, found in dealt.items():
        assert (found - whole).norm() < 1e-4 * whole.norm(), how
    others = {"nothing dropped": (0.0, ONE_STEP), "another seed": (0.4, replace(ONE_STEP, seed=6))}
    for how, (p, settings) in others.items():
        assert (gradients(toy, with_dropout(toy, p), settings) - whole).norm() > 0.05 * whole.norm(), how


def test_a_row_is_dropped_in_proportion_and_by_its_key():
    layer = RowDropout(0.3, "layer", [(5, "row", 1), (5, "row", 2)])
    rows = torch.ones(2, 50, 200)
    found = layer(rows)
    assert sorted(found.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert found.mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(RowDropout(0.3, "layer", [(5, "row", 2)])(rows[1:]), found[1:])
    assert not torch.equal(RowDropout(0.3, "another", [(5, "row", 2)])(rows[1:]), found[1:])
    assert torch.equal(layer.eval()(rows), rows)


@pytest.mark.parametrize(("accumulate", "teacher"), [(1, False), (3, False), (3, True)])
def test_a_trained_text_encoder_runs_once_a_step(toy: Path, accumulate: int, teacher: bool):
    """For both prompts; the base model, where it is the teacher, is asked for its words once in all."""
    loaded, asked = with_dropout(toy), []
    loaded.modules["text_encoder"].register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    settings = changed(steps=3, batch=3, accumulate=accumulate)
    for _ in fit(family_of(toy), loaded, replace(data(), teacher=teacher), settings):
        pass
    assert sorted(asked) == [1] * teacher + [2] * 3
