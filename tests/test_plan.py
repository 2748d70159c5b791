"""What `raybooth plan` says, against what a real step of the same models takes."""

import json
from pathlib import Path

import pytest
import torch
from test_families import rows, settings, whole
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from toys import MAKERS

from raybooth import config
from raybooth.cli import main
from raybooth.families.lora import add_adapters
from raybooth.flops import step_flops, without_weights
from raybooth.method import make_ready
from raybooth.plan import plan
from raybooth.train import fit

BATCH = 8


def measured_peak(folder: Path, made: config.Config) -> int:
    """Bytes at the peak of fit(), from the allocator's own record, with the weights that were there before."""
    family, loaded = whole(folder)
    text_encoder, lora = made.finetune.text_encoder, made.finetune.method == "lora"
    data = rows(family, loaded, text_encoder)
    loaded.modules = {part: loaded.modules[part] for part in family.used_in_training(text_encoder)}
    if lora:
        add_adapters(family, loaded, family.trainable(text_encoder), made.lora, 0)
    held = sum(t.numel() * t.element_size() for m in loaded.modules.values() for t in (*m.parameters(), *m.buffers()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        list(fit(family, loaded, data, settings(family, text_encoder, batch=BATCH)))
    now = peak = 0
    for event in sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


BOTH: list[str] = []
DENOISER, LORA = ["finetune.text_encoder=false"], ["finetune.method=lora", "finetune.text_encoder=false"]


@pytest.mark.parametrize(("name", "how"), [("sd1", BOTH), ("sdxl", DENOISER), ("sd3", LORA)], ids=["sd1", "sdxl, denoiser alone", "sd3, lora"])
def test_the_peak_is_within_15_percent_of_a_real_step(tmp_path: Path, name: str, how: list[str]):
    folder = MAKERS[name](tmp_path / name)
    made = config.load(None, [f"finetune.batch={BATCH}", "finetune.precision=fp32", *how], subject={"class": "dog"}, base={"model": str(folder)})
    planned, measured = plan(folder, made), measured_peak(folder, made)
    print(name, how, planned.memory, planned.peak, measured)
    assert planned.peak == pytest.approx(measured, rel=0.15)


def test_it_counts_what_is_there(tmp_path: Path):
    folder = MAKERS["sd1"](tmp_path / "sd1")
    made = config.load(None, ["generate.images_per_prompt=3", "generate.prompts=['a', 'b']"], subject={"class": "dog"}, base={"model": str(folder)})
    planned = plan(folder, made)
    _, loaded = whole(folder)
    assert dict(planned.parameters) == {part: sum(p.numel() for p in m.parameters()) for part, m in loaded.modules.items()}
    assert planned.trained == planned.parameters["unet"] + planned.parameters["text_encoder"]
    assert (planned.steps, planned.class_pictures, planned.pictures) == (400, 200, 6)


def test_the_command_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = MAKERS["sd1"](tmp_path / "sd1")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    assert json.loads((folder / "model_index.json").read_text())
    assert main(["plan", "--class", "dog", "--base", str(folder), "--gpu", "24GiB"]) == 0
    assert "24GiB: fits" in capsys.readouterr().out
    assert main(["plan", "--class", "dog", "--base", str(folder), "--gpu", "1KiB"]) == 2
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("how", [BOTH, DENOISER, LORA, [*LORA, "prior.method=base-prediction"]], ids=["both", "denoiser", "lora", "taught by the base"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_flops_are_those_of_a_real_step(tmp_path: Path, name: str, how: list[str]):
    folder = MAKERS[name](tmp_path / name)
    made = config.load(None, ["finetune.batch=2", *how], subject={"class": "dog"}, base={"model": str(folder), "resolution": 32})
    family, loaded = whole(folder)
    text_encoder, teacher = made.finetune.text_encoder, made.prior.method == "base-prediction"
    data = rows(family, loaded, text_encoder, teacher)
    loaded.modules = {part: loaded.modules[part] for part in family.used_in_training(text_encoder)}
    make_ready(family, loaded, made.finetune, made.lora, 0)
    steps = fit(family, loaded, data, settings(family, text_encoder, steps=1))
    # The CPU's own attention is an operation that the counter does not know; by matrix products it is counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next(steps)
    counted = step_flops(family, without_weights(family, folder, made.finetune, made.lora), made.prior, made.finetune, 32, workers=1)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("how", [BOTH, LORA], ids=["both", "lora"])
def test_bf16_weights_are_counted_and_planned_like_others(tmp_path: Path, how: list[str], capsys: pytest.CaptureFixture[str]):
    folder = MAKERS["sd1"](tmp_path / "sd1")
    counted = []
    for precision in ("fp32", "bf16-weights"):
        made = config.load(None, [*how, f"finetune.precision={precision}"], subject={"class": "dog"}, base={"model": str(folder), "resolution": 32})
        family = whole(folder)[0]
        counted.append(step_flops(family, without_weights(family, folder, made.finetune, made.lora), made.prior, made.finetune, 32, workers=1))
    assert counted[0] == counted[1] > 0
    sets = [part for s in [*how, "finetune.precision=bf16-weights"] for part in ("--set", s)]
    assert main(["plan", "--class", "dog", "--base", str(folder), *sets]) == 0
