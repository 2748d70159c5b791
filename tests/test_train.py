"""fit() against a plain torch loop, and its promises: clipping, determinism, shares of workers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import make_flux, make_sd, make_sd3, make_sdxl

from raybooth.dataset import TrainingSet, rows_of_step
from raybooth.errors import RayboothError
from raybooth.families import Loaded, family_of
from raybooth.families.lora import adapters_off
from raybooth.families.parts import load
from raybooth.finetune_job import out_of_memory_explained
from raybooth.method import make_ready
from raybooth.noise import Diffusion, generator, normal
from raybooth.optim import StochasticAdamW
from raybooth.sections import Finetune, Lora
from raybooth.train import Parallel, Settings, State, fit

ALONE, PLAIN = Parallel(), Finetune()


def changed(autocast: torch.dtype | None = None, seed: int = 5, **values: Any) -> Settings:
    return Settings(Finetune(**dict(steps=4, batch=2, lr=1e-3, weight_decay=0.01, max_grad_norm=0.05, log_every=1) | values), seed, autocast)


SETTINGS = changed()


def data(instances: int = 3, classes: int = 4, weight: float = 0.6) -> TrainingSet:
    n, g = instances + classes, torch.Generator().manual_seed(1)
    of_class = torch.arange(n) >= instances
    return TrainingSet(
        mean=torch.randn(n, 4, 16, 16, generator=g),
        std=0.1 * torch.rand(n, 4, 16, 16, generator=g),
        prompt=of_class.int().tolist(),
        weight=torch.where(of_class, weight, 1.0),
        prompts=["photo of unqtkn dog", "photo of a dog"],
        instances=instances,
    )


def readied(toy: Path, how: Finetune) -> Loaded:
    """As a worker has it."""
    family = family_of(toy)
    loaded = load(family, toy, family.trainable(how.text_encoder))
    make_ready(family, loaded, how, Lora(rank=4), 0)
    return loaded


def trained(
    toy: Path, settings: Settings = SETTINGS, rows: TrainingSet | None = None, parallel: Parallel = ALONE, how: Finetune = PLAIN, start: State | None = None
):  # fmt: skip
    loaded = readied(toy, how)
    steps = list(fit(family_of(toy), loaded, rows or data(), settings, parallel, start))
    return {f"{part}.{k}": v for part, m in loaded.modules.items() for k, v in m.state_dict().items()}, steps


def predicted(toy: Path, loaded: Loaded, rows: TrainingSet, index: list[int], places: list[int], step: int, seed: int, offset: float = 0.0):
    """What the model says of noised rows, and what was to be said: one encoding a row."""
    family = family_of(toy)
    diffusion = family.objective(toy)
    assert isinstance(diffusion, Diffusion)
    shape = rows.mean.shape[1:]
    draw = [normal(shape, seed, "posterior", step, i) for i in places]
    noise = torch.stack([normal(shape, seed, "noise", step, i) + offset * normal((4, 1, 1), seed, "offset", step, i) for i in places])
    t = torch.cat([torch.randint(1000, (1,), generator=generator(seed, "timestep", step, i)) for i in places])
    x0 = rows.mean[index] + rows.std[index] * torch.stack(draw)
    text_of_rows = family.encode_text(loaded, [rows.prompts[int(rows.prompt[i])] for i in index])["text"]
    alpha = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
    return loaded.modules["unet"](alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, t, text_of_rows).sample, noise


def plain_loop(toy: Path, settings: Settings, rows: TrainingSet):
    """The same, written down straight: chunks, torch's own optimizer and clipping, a second model as the teacher."""
    loaded, base = (load(family_of(toy), toy, ("unet", "text_encoder")) for _ in range(2))
    parameters = [p.requires_grad_() for m in loaded.modules.values() for p in m.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.finetune.lr, weight_decay=settings.finetune.weight_decay)
    losses, norms = [], []
    for step in range(settings.finetune.steps):
        index = rows_of_step(rows, step, settings.finetune.batch, settings.seed)
        with torch.autocast("cpu", settings.autocast, enabled=settings.autocast is not None):
            given: Any = (rows, index, list(range(len(index))), step, settings.seed, settings.finetune.noise_offset)
            out, noise = predicted(toy, loaded, *given)
            with torch.no_grad():
                of_class = predicted(toy, base, *given)[0].float() if rows.teacher else noise
        out, b = out.float(), settings.finetune.batch
        loss = F.mse_loss(out[:b], noise[:b])
        if len(index) > b:
            loss = loss + float(rows.weight[-1]) * F.mse_loss(out[b:], of_class[b:])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings.finetune.max_grad_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return {f"{part}.{k}": v for part, m in loaded.modules.items() for k, v in m.state_dict().items()}, losses, norms


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        (data(), {}), (data(classes=0), {}), (data(), {"noise_offset": 0.1}), (replace(data(weight=2), teacher=True), {}),
        (replace(data(classes=0), teacher=True), {}),
    ],
    ids=["with prior", "without prior", "noise offset", "taught by the base", "nothing to teach"],
)  # fmt: skip
def test_it_is_a_plain_loop(toy: Path, rows: TrainingSet, more: dict[str, Any]):
    settings = changed(**more)
    ours, steps = trained(toy, settings, rows)
    theirs, losses, norms = plain_loop(toy, settings, rows)
    assert [s.metrics.loss for s in steps] == pytest.approx(losses, rel=1e-5)
    assert [s.metrics.grad_norm for s in steps] == pytest.approx(norms, rel=1e-4)
    for name, value in theirs.items():
        # AdamW's first steps are +-lr whatever the gradient's size: where it is nearly zero its sign is noise.
        assert (ours[name] - value).abs().float().mean() < 2e-5, name


def test_autocast_is_of_the_forward_pass_alone(toy: Path, monkeypatch: pytest.MonkeyPatch):
    """As torch advises; a plain loop by the same recipe has the same losses, as far as bfloat16 can tell."""
    backward, during = torch.Tensor.backward, []

    def watched(self: torch.Tensor) -> None:
        during.append(torch.is_autocast_enabled("cpu"))
        backward(self)

    settings = changed(autocast=torch.bfloat16)
    _, losses, _ = plain_loop(toy, settings, data())
    monkeypatch.setattr(torch.Tensor, "backward", watched)
    _, steps = trained(toy, settings)
    assert during == [False] * settings.finetune.steps
    assert [s.metrics.loss for s in steps] == pytest.approx(losses, rel=2e-3)


@pytest.mark.parametrize(("batch", "accumulate"), [(2, 1), (3, 1), (4, 4)])
@pytest.mark.parametrize("classes", [4, 0], ids=["with prior", "without prior"])
def test_validation_is_the_loss_of_fixed_rows_at_fixed_noise(toy: Path, classes: int, batch: int, accumulate: int):
    rows, loaded = data(classes=classes), load(family_of(toy), toy, ("unet", "text_encoder"))
    step = next(fit(family_of(toy), loaded, rows, changed(batch=batch, accumulate=accumulate)))
    found = step.validate()
    assert loaded.modules["unet"].training
    of = {"validation_instance": [0, 1, 2, 0, 1, 2, 0, 1], "validation_prior": [3, 4, 5, 6, 3, 4, 5, 6]}
    assert found.keys() == ({*of} if classes else {"validation_instance"})
    for name, value in found.items():
        with torch.no_grad():
            assert value == pytest.approx(F.mse_loss(*predicted(toy, loaded, rows, of[name], list(range(8)), -1, SETTINGS.seed)).item(), rel=1e-5)


@pytest.mark.parametrize("how", [Finetune(gradient_checkpointing=True), Finetune(channels_last=True)], ids=["gradient checkpointing", "channels last"])
def test_how_it_is_computed_changes_nothing(toy: Path, how: Finetune):
    plain, steps = trained(toy)
    ours, same = trained(toy, how=how)
    assert [s.metrics.loss for s in same] == pytest.approx([s.metrics.loss for s in steps], rel=1e-5)
    assert all((ours[k] - plain[k]).abs().float().mean() < 2e-5 for k in plain)


def test_what_it_is_computed_by_is_asked_for(toy: Path, monkeypatch: pytest.MonkeyPatch):
    compiled: list[type] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module)))
    loaded = readied(toy, Finetune(compile=True, gradient_checkpointing=True, channels_last=True))
    denoiser, encoder = loaded.modules["unet"], loaded.modules["text_encoder"]
    assert compiled == [type(denoiser)]
    assert {m.gradient_checkpointing for part in (denoiser, encoder) for m in part.modules() if hasattr(m, "gradient_checkpointing")} == {True}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in denoiser.parameters() if p.dim() == 4)


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(2, 1, 1), (3, 2, 1), (1, 1, 2), (3, 1, 2)])
def test_the_base_is_asked_for_class_rows_alone(toy: Path, batch: int, accumulate: int, world: int):
    """And they are taught by it, however the rows are dealt."""
    rows, how, asked = replace(data(), teacher=True), Finetune(method="lora"), []

    def moved() -> Loaded:
        loaded = readied(toy, how)
        for name, p in loaded.modules["unet"].named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
        return loaded

    def losses(loaded: Loaded, index: list[int], places: list[int], step: int) -> tuple[float, float]:
        half, given = len(index) // 2, (index, places, step, SETTINGS.seed)
        with torch.no_grad():
            out, noise = predicted(toy, loaded, rows, *given)
            with adapters_off(loaded.modules.values()):
                base, _ = predicted(toy, loaded, rows, *given)
        return F.mse_loss(out[:half], noise[:half]).item(), F.mse_loss(out[half:], base[half:]).item()

    settings, found = changed(batch=batch, accumulate=accumulate, steps=1), torch.zeros(2)
    for rank in range(world):
        loaded = moved()
        hook = loaded.modules["unet"].register_forward_pre_hook(lambda _, given: None if torch.is_grad_enabled() else asked.append(len(given[0])))
        step = next(fit(family_of(toy), loaded, rows, settings, Parallel(rank, world)))
        hook.remove()
        assert step.metrics
        found += torch.tensor([step.metrics.instance, step.metrics.prior])
    assert sum(asked) == batch
    index = rows_of_step(rows, 0, batch, SETTINGS.seed)
    assert found.tolist() == pytest.approx(losses(moved(), index, list(range(len(index))), 0), rel=1e-4)
    fixed = losses(loaded, [0, 1, 2, 0, 1, 2, 0, 1, 3, 4, 5, 6, 3, 4, 5, 6], [*range(8)] * 2, -1)
    assert [*step.validate().values()] == pytest.approx(fixed, rel=1e-4)


def test_the_base_still_teaches_a_run_that_goes_on(toy: Path):
    """And not the model that it goes on from."""
    rows, loaded = replace(data(weight=2), teacher=True), readied(toy, PLAIN)
    steps = fit(family_of(toy), loaded, rows, SETTINGS)
    half = next(s for s in steps if s.number == 2).state()
    half = replace(half, tensors={k: v.clone() for k, v in half.tensors.items()})
    _, rest = trained(toy, rows=rows, start=half)
    assert [s.metrics for s in rest] == [s.metrics for s in steps]
    assert min(s.metrics.prior for s in rest) > 1e-4


def one_by_one(clip: Callable) -> Callable:
    """Tensors without data are not handled many at a time."""
    return lambda *given, foreach: clip(*given, foreach=not foreach)


@pytest.mark.parametrize(("make", "text_encoder"), [(make_sd, True), (make_sd, False), (make_sdxl, False), (make_sd3, False), (make_flux, False)])
def test_no_step_waits_for_numbers(make: Callable[[Path], Path], text_encoder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On the meta device there are none: whatever asks for one fails, as it would make a GPU's step wait."""
    folder = make(tmp_path / "model")
    family = family_of(folder)
    rows = data()
    if not text_encoder:
        shapes = family.conditioning(folder)
        rows = replace(rows, conditioning={k: torch.zeros(2, *shape) for k, shape in shapes.items()})
    loaded = load(family, folder, family.trainable(text_encoder)).to("meta")
    monkeypatch.setattr("raybooth.train.make_optimizer", lambda kind, groups, decay, seed: torch.optim.AdamW(groups, weight_decay=decay, foreach=False))
    for name in ("get_total_norm", "clip_grads_with_norm_"):
        monkeypatch.setattr(torch.nn.utils, name, one_by_one(getattr(torch.nn.utils, name)))
    settings = changed(text_encoder=text_encoder, log_every=3, min_snr_gamma=5.0 if family.min_snr else 0.0)
    steps = fit(family, loaded, rows.to(torch.device("meta")), settings)
    assert [next(steps).metrics, next(steps).metrics] == [None, None]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        next(steps)  # the reading


def test_the_same_seed_gives_the_same_bits_and_another_does_not(toy: Path):
    first, again, other = trained(toy)[0], trained(toy)[0], trained(toy, changed(seed=6))[0]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, torch.optim.AdamW), (torch.bfloat16, StochasticAdamW)])
def test_the_gradient_is_clipped(toy: Path, dtype: torch.dtype, kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch):
    """What reaches the optimizer is within the bound, though what came from the loss was far above it."""
    norms, step = [], kind.step

    def watched(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.double().norm() for g in gradients]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(kind, "step", watched)
    loaded = load(family_of(toy), toy, ("unet", "text_encoder")).to(dtype)
    settings = changed(max_grad_norm=0.01, steps=8, autocast=None if dtype is torch.float32 else dtype)
    assert all(s.metrics.grad_norm > 0.02 for s in fit(family_of(toy), loaded, data(), settings) if s.metrics)
    assert max(norms) <= 0.01
    assert min(norms) > 0.01 * (0.998 if dtype is torch.float32 else 0.995)  # bfloat16's rounding is held back by 0.4%


def test_without_the_text_encoder_only_the_unet_moves(toy: Path):
    family = family_of(toy)
    loaded = load(family, toy, ("unet", "text_encoder"))
    rows = data()
    with torch.no_grad():
        frozen = TrainingSet(**{**vars(rows), "conditioning": family.encode_text(loaded, rows.prompts)})
    before = load(family, toy, ("unet", "text_encoder"))
    list(fit(family, loaded, frozen, changed(text_encoder=False)))
    moved = {
        part: any(not torch.equal(a, b) for a, b in zip(m.parameters(), before.modules[part].parameters(), strict=True)) for part, m in loaded.modules.items()
    }
    assert moved == {"unet": True, "text_encoder": False}


def test_every_row_is_dealt_once_an_epoch():
    rows = data(instances=5, classes=8)
    instance = [i for step in range(5) for i in rows_of_step(rows, step, 2, 0)[:2]]
    classes = [i for step in range(4) for i in rows_of_step(rows, step, 2, 0)[2:]]
    assert sorted(instance[:5]) == sorted(instance[5:]) == list(range(5))
    assert sorted(classes) == list(range(5, 13))


@pytest.mark.parametrize("text", ["", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when", "CUDA error: out of memory\nCompile", "can't allocate memory: you"])
def test_out_of_memory_names_what_needs_less_in_order(text: str):
    with pytest.raises(RayboothError) as said, out_of_memory_explained():
        raise RuntimeError(text) if text else torch.OutOfMemoryError("CUDA out of memory")
    places = [str(said.value).index(name) for name in ("finetune.batch", "lora", "gradient_checkpointing", "adamw8bit")]
    assert places == sorted(places)
    assert "With any of these the fine-tuning begins anew" in str(said.value)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_explained():
        raise RuntimeError("shapes do not match")


def test_parts_have_their_own_learning_rates(toy: Path):
    before = load(family_of(toy), toy, ("unet", "text_encoder"))
    after, _ = trained(toy, changed(steps=1, weight_decay=0.0, lr=1e-3, text_encoder_lr=1e-5))
    moved = {
        part: max(float((after[f"{part}.{k}"] - v).abs().max()) for k, v in m.state_dict().items() if v.is_floating_point())
        for part, m in before.modules.items()
    }
    assert moved["unet"] == pytest.approx(1e-3, rel=0.01)  # AdamW's first step is the learning rate
    assert moved["text_encoder"] == pytest.approx(1e-5, rel=0.05)


def test_bf16_weights_move_by_stochastic_rounding_and_stand_still_without(toy: Path):
    """The 2023 notebook's defect: at lr 5e-6 most updates are less than half a bf16 step of the weight."""
    family = family_of(toy)
    moved = {}
    for name, kind in (("rounded stochastically", None), ("to nearest", torch.optim.AdamW)):
        loaded = load(family, toy, ("unet", "text_encoder")).to(torch.bfloat16)
        before = [p.clone() for p in loaded.modules["unet"].parameters()]
        with pytest.MonkeyPatch.context() as patch:
            if kind:
                patch.setattr("raybooth.train.make_optimizer", lambda _, groups, weight_decay, __, kind=kind: kind(groups, weight_decay=weight_decay))
            settings = changed(steps=6, lr=5e-6, autocast=torch.bfloat16)
            list(fit(family, loaded, data(), settings))
        pairs = list(zip(before, loaded.modules["unet"].parameters(), strict=True))
        moved[name] = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    print(moved)
    assert moved["to nearest"] < 0.1
    assert moved["rounded stochastically"] > 3 * moved["to nearest"]


def test_min_snr_weighs_as_diffusers_does(toy: Path):
    from diffusers import DDIMScheduler
    from diffusers.training_utils import compute_snr

    t, scheduler = torch.tensor([0, 100, 500, 900, 999]), DDIMScheduler.from_pretrained(toy / "scheduler")
    snr = compute_snr(scheduler, t)
    diffusion = family_of(toy).objective(toy)
    assert isinstance(diffusion, Diffusion)
    assert torch.allclose(diffusion.weight(t, 5.0), snr.clamp(max=5) / snr)
    velocity = replace(diffusion, prediction="v_prediction")
    assert torch.allclose(velocity.weight(t, 5.0), snr.clamp(max=5) / (snr + 1))
    assert torch.equal(diffusion.weight(t, 0.0), torch.ones(5))
