"""What `raybooth plan` says, against what a real step of the same models takes."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import toys
from test_families import rows, settings, whole
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from toys import MAKERS

import raybooth
from raybooth import config
from raybooth.cli import main
from raybooth.cluster.fit import DDP
from raybooth.families import family_of
from raybooth.families.parts import load
from raybooth.flops import step_flops, without_weights
from raybooth.method import autocast_dtype, held_in, make_ready
from raybooth.planning import Plan, plan
from raybooth.sample import Sampler
from raybooth.sections import Finetune, Sampling
from raybooth.train import Parallel, fit

BATCH = 8
OPTIMIZERS = get_args(Finetune.model_fields["optimizer"].annotation)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """Of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def measured_peak(folder: Path, made: config.Config) -> int:
    """Bytes at the peak of fit() in the first worker, from the allocator's own record, with the weights that were there before, but not the latents."""
    how, family = made.finetune, family_of(folder)
    data = rows(*whole(folder), how.text_encoder, made.prior.teacher)
    loaded = load(family, folder, family.trainable(how.text_encoder), held_in(family, how, "cpu"))
    make_ready(family, loaded, how, made.lora, 0)
    set_up = settings(
        how.text_encoder, batch=how.batch, accumulate=how.accumulate, optimizer=how.optimizer, ema=how.ema,
        autocast=autocast_dtype(family, how.precision, "cpu"),
    )  # fmt: skip
    workers = made.cluster.worker_range[0]
    # Not sent to others at first: gloo's own threads may let go of that copy, which the record does not see.
    wrap = partial(nn.parallel.DistributedDataParallel, init_sync=False, **DDP)
    parallel = Parallel(0, workers, wrap) if workers > 1 else Parallel()
    held = sum(t.numel() * t.element_size() for m in loaded.modules.values() for t in (*m.parameters(), *m.buffers()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        list(fit(family, loaded, data, set_up, parallel))
    return held + recorded_peak(record)


def recorded_peak(record: profile) -> int:
    now = peak = 0
    for event in sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        now += event.nbytes()  # type: ignore[union-attr]
        peak = max(peak, now)
    return peak


BOTH: list[str] = []
DENOISER, LORA = ["finetune.text_encoder=false"], ["finetune.method=lora", "finetune.text_encoder=false"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("sd1", BOTH), ("sdxl", DENOISER), ("sd3", LORA), ("sd3", [*LORA, "finetune.precision=bf16"]), ("sd3", BOTH),
        ("sd1", ["finetune.ema=0.9"]), ("sd1", ["finetune.optimizer=adafactor"]), ("sd1", ["finetune.precision=bf16-weights"]),
        ("sd1", ["finetune.gradient_checkpointing=true"]), ("sd1", ["finetune.accumulate=2"]), ("sd3.5", DENOISER), ("schnell", DENOISER),
        ("sd1", ["prior.distill=true"]), ("sd1", [*DENOISER, "finetune.precision=bf16", "prior.distill=true"]),
    ],
    ids=["sd1", "sdxl, denoiser alone", "sd3, lora", "sd3, lora in bf16", "sd3", "sd1, average", "sd1, adafactor", "sd1, bf16 weights",
         "sd1, gradient checkpointing", "sd1, accumulation", "sd3.5, denoiser alone", "schnell, denoiser alone", "sd1, distilled", "sd1, distilled in bf16"],
)  # fmt: skip
def test_the_peak_is_within_15_percent_of_a_real_step(name: str, how: list[str]):
    folder = toys.made(name)
    made = config.load(None, [f"finetune.batch={BATCH}", "finetune.precision=fp32", *how], subject={"class": "dog"}, base={"model": str(folder)})
    planned, measured = plan(folder, made, "cpu"), measured_peak(folder, made)
    print(name, how, planned.memory, planned.peak, measured)
    assert planned.peak - planned.memory["latents"] == pytest.approx(measured, rel=0.15)


def in_float32(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def computed(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return norm(*(a.float() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)

    return computed


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3.5", "flux"])
def test_norms_are_planned_in_float32_as_cudas_autocast_computes_them(name: str, monkeypatch: pytest.MonkeyPatch):
    """torch/include/ATen/autocast_mode.h, AT_FORALL_FP32: group_norm, layer_norm, rms_norm."""
    folder, how = toys.made(name), [*LORA, f"finetune.batch={BATCH}", "finetune.precision=bf16"]
    made = config.load(None, how, subject={"class": "dog"}, base={"model": str(folder)})
    planned, of_a_cpu = plan(folder, made, "cuda"), plan(folder, made, "cpu")
    for norm in ("group_norm", "layer_norm", "rms_norm"):
        monkeypatch.setattr(torch.nn.functional, norm, in_float32(getattr(torch.nn.functional, norm)))
    measured = measured_peak(folder, made)
    print(name, planned.peak, of_a_cpu.peak, measured)
    assert planned.memory["activations"] > 1.04 * of_a_cpu.memory["activations"]
    assert planned.peak - planned.memory["latents"] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("name", "how"), [("sd1", []), ("sdxl", ["cluster.sample_batch=4"]), ("sd3", []), ("flux", []), ("sd1", ["base.resolution=256"])])
def test_the_peak_of_drawing_is_within_15_percent_of_a_real_batch(name: str, how: list[str]):
    """All parts of the model are there, the encoders of its prompts too."""
    folder = toys.made(name)
    made = config.load(None, [*how, "generate.guidance=7.5"], subject={"class": "dog"}, base={"model": str(folder)})
    family, batch = family_of(folder), made.cluster.sample_batch
    planned = plan(folder, made, "cpu")
    loaded = load(family, folder, (family.denoiser, "vae", *family.encoders))
    held = sum(t.numel() * t.element_size() for m in loaded.modules.values() for t in (*m.parameters(), *m.buffers()))
    side = made.base.resolution or loaded.facts.resolution
    drawing = Sampler(family, loaded, Sampling(2, 7.5, "euler", side), batch)
    drawing.draw_batch(["a dog"] * batch, range(batch))  # its prompts are encoded, and what is made once is there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        drawing.draw_batch(["a dog"] * batch, range(batch))
    print(name, how, planned.drawing, planned.drawing_peak, held, recorded_peak(record))
    assert planned.drawing["weights"] == pytest.approx(held, rel=0.01)
    assert planned.drawing_peak == pytest.approx(held + recorded_peak(record), rel=0.15)


@pytest.mark.parametrize(("passes", "copies"), [(1, 1), (2, 2)])
@pytest.mark.usefixtures("group")
def test_workers_hold_gradients_between_their_steps(toy: Path, passes: int, copies: int):
    """In the buckets of DistributedDataParallel; those of passes before the last lie beside them."""
    how = ["finetune.batch=4", "finetune.precision=fp32", f"finetune.accumulate={passes}", "cluster.workers=2"]
    made = config.load(None, how, subject={"class": "dog"}, base={"model": str(toy)})
    planned = plan(toy, made)
    assert planned.memory["gradients"] == pytest.approx(copies * 4 * planned.trained, rel=0.01)
    assert planned.memory["latents"] == 200 * 2 * 4 * (4 * 16 * 16)  # mean and std of each class picture
    assert planned.peak - planned.memory["latents"] == pytest.approx(measured_peak(toy, made), rel=0.04)


def planned(folder: Path, *how: str) -> Plan:
    return plan(folder, config.load(None, list(how), subject={"class": "dog"}, base={"model": str(folder)}))


def test_optimizers_and_the_average_take_what_they_hold():
    folder = toys.made("sd1")
    plain, averaged = planned(folder), planned(folder, "finetune.ema=0.9")
    assert plain.memory["average"] == 0
    assert averaged.memory["average"] == 4 * plain.trained
    assert averaged.peak - plain.peak == 4 * plain.trained
    took = {name: planned(folder, f"finetune.optimizer={name}", "finetune.lr=1").memory["optimizer"] / plain.trained for name in OPTIMIZERS}
    assert took["adamw"] == pytest.approx(8, rel=0.01)
    assert took["prodigy"] == pytest.approx(16, rel=0.01)
    assert took["adafactor"] < took["adamw8bit"] < 4
    assert planned(folder, "finetune.precision=bf16-weights").memory["optimizer"] == pytest.approx(4 * plain.trained, rel=0.05)


def test_adapters_lie_on_weights_of_half_the_size():
    folder = toys.made("sd3")
    whole_size, half = (planned(folder, *LORA, f"finetune.precision={p}").memory["weights"] for p in ("fp32", "bf16"))
    adapters = 4 * planned(folder, *LORA).trained
    assert half - adapters == pytest.approx((whole_size - adapters) / 2, rel=0.01)


def test_it_counts_what_is_there():
    folder = toys.made("sd1")
    made = config.load(None, ["generate.images_per_prompt=3", "generate.prompts=['a', 'b']"], subject={"class": "dog"}, base={"model": str(folder)})
    planned = plan(folder, made)
    _, loaded = whole(folder)
    assert dict(planned.parameters) == {part: sum(p.numel() for p in m.parameters()) for part, m in loaded.modules.items()}
    assert planned.trained == planned.parameters["unet"] + planned.parameters["text_encoder"]
    assert (planned.steps, planned.class_pictures, planned.pictures) == (400, 200, 6)


def test_what_is_not_written_needs_no_disk(toy: Path):
    """The last step is a checkpoint only if it is one among others to choose from. Class pictures lie there with their latents."""
    no_class, select = "prior.images=0", "evaluate.select=balance"
    none, one, two = (planned(toy, no_class, *how).stored for how in (["finetune.steps=100"], ["finetune.steps=100", select], ["finetune.steps=101", select]))
    checkpoint = 3 * 4 * planned(toy).trained  # weights and AdamW's two moments
    assert (one - none, two - one) == (pytest.approx(checkpoint, rel=0.01), pytest.approx(checkpoint, rel=0.01))
    assert planned(toy, "finetune.steps=100", "prior.images=10").stored - none == 10 * (32 * 32 * 3 + 2 * 4 * 4 * 16 * 16)


def test_weights_that_are_not_there_are_as_large_as_their_list_says(tmp_path: Path):
    """Else as in float32. The result has a copy of those that are not trained."""
    folder, once = MAKERS["sd3"](tmp_path / "sd3"), "finetune.checkpoint_every=400"
    with_weights = planned(folder, once).stored
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    without = planned(folder, once)
    assert without.stored == pytest.approx(with_weights, rel=0.03)
    t5 = without.parameters["text_encoder_3"]
    listed = {"metadata": {"total_size": 2 * t5}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "text_encoder_3" / "model.safetensors.index.json").write_text(json.dumps(listed))
    assert without.stored - planned(folder, once).stored == 2 * 2 * t5


def test_the_command_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = MAKERS["sd1"](tmp_path / "sd1")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    assert json.loads((folder / "model_index.json").read_text())
    assert main(["plan", "--class", "dog", "--base", str(folder), "--gpu", "24GiB"]) == 0
    assert "24GiB: fits" in (said := capsys.readouterr().out)
    made = config.load(None, [], subject={"class": "dog"}, base={"model": str(folder)}, storage=str(tmp_path / "none"))
    planned = raybooth.plan(made)
    assert said.startswith(str(planned))
    assert main(["plan", "--class", "dog", "--base", str(folder), "--gpu", "0.001GiB"]) == 0
    assert "0.001GiB: does not fit" in (said := capsys.readouterr().out)
    assert "neither fine-tuning nor drawing would; lower cluster.sample_batch" in said
    assert "finetune.method = lora with finetune.lr = 1e-4" in said
    between = (planned.peak + planned.drawing_peak) / 2 * 1.1 / (1 << 30)  # of a toy, as of SD 1.4, the step is the larger
    assert main(["plan", "--class", "dog", "--base", str(folder), "--gpu", f"{between:.6f}GiB"]) == 0
    assert "does not fit: " in (said := capsys.readouterr().out)
    assert "finetune.method = lora with finetune.lr = 1e-4" in said
    lora = ["--set=finetune.method=lora", "--set=finetune.gradient_checkpointing=true", "--set=finetune.batch=1", "--set=cluster.sample_batch=64"]
    assert main(["plan", "--class", "dog", "--base", str(folder), "--gpu", f"{between:.6f}GiB", *lora]) == 0
    assert "does not fit: fine-tuning would, drawing would not; lower cluster.sample_batch" in capsys.readouterr().out
    assert main(["plan", "--class", "dog", "--base", str(folder), "--gpu", "1KiB"]) == 2
    assert torch.get_default_dtype() is torch.float32


def counted_and_real(folder: Path, *how: str) -> tuple[int, int]:
    """The FLOPs of a step, as they are counted without data and as the workers' steps have them."""
    made = config.load(None, list(how), subject={"class": "dog"}, base={"model": str(folder), "resolution": 32})
    family, workers = family_of(folder), made.cluster.worker_range[0]
    set_up = settings(made.finetune.text_encoder, steps=2, batch=made.finetune.batch, accumulate=made.finetune.accumulate)
    real = 0
    for rank in range(workers):
        _, loaded = whole(folder)
        data = rows(family, loaded, made.finetune.text_encoder, made.prior.teacher, with_class=made.prior.method != "none")
        loaded.modules = {part: loaded.modules[part] for part in family.trainable(made.finetune.text_encoder)}
        make_ready(family, loaded, made.finetune, made.lora, 0)
        steps = fit(family, loaded, data, set_up, Parallel(rank, workers))
        next(steps)  # in which a teacher encodes its prompt for the rest of the run
        # The CPU's own attention is an operation that the counter does not know; by matrix products it is counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            next(steps)
        real += counter.get_total_flops()
    return step_flops(family, without_weights(family, folder, made.finetune, made.lora), made.prior, made.finetune, 32, workers), real


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", [*MAKERS, "sd3.5"])
def test_the_flops_of_drawing_are_those_of_real_pictures(name: str, guidance: float):
    folder = toys.made(name)
    sampling = [f"generate.guidance={guidance}", "generate.steps=3", "generate.scheduler=euler", "generate.images_per_prompt=2", "generate.prompts=a dog"]
    made = config.load(None, [*sampling, "prior.images=0", "cluster.sample_batch=2"], subject={"class": "dog"}, base={"model": str(folder), "resolution": 32})
    family, loaded = whole(folder)
    draw = Sampler(family, loaded, Sampling(3, guidance, "euler", 32), 2).draw
    list(draw(["a dog"] * 2, [0, 1]))  # it keeps encoded prompts, which are not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        list(draw(["a dog"] * 2, [0, 1]))
    assert plan(folder, made).drawing_flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_flops_of_drawing_count_batches_that_are_filled_up_and_prompts_that_are_one():
    folder = toys.made("sd1")
    family, loaded = whole(folder)
    prompts = 'generate.prompts=["a dog", "a {class}", "a cat"]'
    settings = ["generate.steps=3", "generate.scheduler=pndm", "generate.images_per_prompt=1", prompts, "prior.images=0", "cluster.sample_batch=4"]
    made = config.load(None, settings, subject={"class": "dog"}, base={"model": str(folder), "resolution": 32})
    sampler = Sampler(family, loaded, family.sampling(made.generate, 32), 4)
    list(sampler.draw(["a dog", "a cat"], [0, 0]))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        list(sampler.draw(["a dog", "a cat"], [0, 0]))
    planned = plan(folder, made)
    assert planned.pictures == 2
    assert planned.drawing_flops == pytest.approx(counter.get_total_flops(), rel=0.02)


TAUGHT = [*LORA, "prior.method=base-prediction"]


@pytest.mark.parametrize("how", [BOTH, DENOISER, LORA, TAUGHT], ids=["both", "denoiser", "lora", "taught by the base"])
@pytest.mark.parametrize("name", [*MAKERS, "sd3.5"])
def test_the_flops_are_those_of_a_real_step(name: str, how: list[str]):
    counted, real = counted_and_real(toys.made(name), "finetune.batch=2", *how)
    assert counted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    "how",
    [
        ["finetune.batch=1", "finetune.accumulate=8", "prior.method=none"], ["finetune.batch=3", "finetune.accumulate=4"],
        ["finetune.batch=3", "cluster.workers=2", *TAUGHT], ["finetune.batch=3", "cluster.workers=2", "finetune.accumulate=2", *TAUGHT],
        ["finetune.method=lora", "prior.method=base-prediction"], ["finetune.batch=3", "finetune.accumulate=2", "prior.distill=true"],
    ],
    ids=["fewer rows than passes", "passes of two sizes", "workers with other rows", "workers and passes", "a teacher with encoders", "a copy for a teacher"],
)  # fmt: skip
def test_only_rows_that_are_dealt_have_flops(toy: Path, how: list[str]):
    counted, real = counted_and_real(toy, *how)
    assert counted == pytest.approx(real, rel=0.001)


@pytest.mark.parametrize("how", [BOTH, LORA], ids=["both", "lora"])
def test_bf16_weights_are_counted_and_planned_like_others(how: list[str], capsys: pytest.CaptureFixture[str]):
    folder = toys.made("sd1")
    counted = []
    for precision in ("fp32", "bf16-weights"):
        made = config.load(None, [*how, f"finetune.precision={precision}"], subject={"class": "dog"}, base={"model": str(folder), "resolution": 32})
        family = whole(folder)[0]
        counted.append(step_flops(family, without_weights(family, folder, made.finetune, made.lora), made.prior, made.finetune, 32, workers=1))
    assert counted[0] == counted[1] > 0
    sets = [part for s in [*how, "finetune.precision=bf16-weights"] for part in ("--set", s)]
    assert main(["plan", "--class", "dog", "--base", str(folder), *sets]) == 0
