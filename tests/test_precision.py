"""What weights are held in, and that all families train and draw so. A CPU takes the types that a GPU would, slowly."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toys
from diffusers import DiffusionPipeline
from stored import make_adapters
from test_families import draw, rows, settings, whole
from torch.nn.parallel import DistributedDataParallel
from toys import MAKERS

from raybooth.cluster.fit import DDP
from raybooth.families import FAMILIES, family_of
from raybooth.families.base import Family, Loaded
from raybooth.families.lora import add_adapters, load_adapters, save_adapters
from raybooth.families.parts import load, save
from raybooth.finetune_job import in_common
from raybooth.jobs import for_inference
from raybooth.method import autocast_dtype, drawing_dtype, held_in, make_ready
from raybooth.sections import Finetune, Lora
from raybooth.train import Parallel, State, Step, fit

Wrap = Callable[[torch.nn.Module], torch.nn.Module]
LORA = Finetune(method="lora", precision="bf16", text_encoder=True)


def adapted(folder: Path, how: Finetune = LORA, lora: Lora | None = None) -> tuple[Family, Loaded]:
    """As a worker has it."""
    family = family_of(folder)
    loaded = load(family, folder, family.trainable(how.text_encoder), held_in(family, how, "cpu"))
    make_ready(family, loaded, how, lora or Lora(rank=4), 0)
    return family, loaded


def taught(
    folder: Path, family: Family, loaded: Loaded, how: Finetune = LORA, teacher: bool = False, wrap: Wrap = lambda module: module,
    start: State | None = None, **more: Any,
) -> Iterator[Step]:  # fmt: skip
    data = rows(*whole(folder), how.text_encoder, teacher)
    changed = settings(how.text_encoder, lr=0.01, autocast=autocast_dtype(family, how.precision, "cpu"), **more)
    return fit(family, loaded, data, changed, Parallel(wrap=wrap), start)


def losses(steps: Iterable[Step]) -> list[float]:
    return [s.metrics.loss for s in steps if s.metrics]


@pytest.mark.parametrize(
    ("method", "precision", "device", "dtype"),
    [
        ("lora", "bf16", "cpu", torch.bfloat16), ("lora", "fp16", "cuda", torch.float16), ("lora", "auto", "cuda", torch.bfloat16),
        ("lora", "auto", "mps", torch.float32), ("lora", "fp32", "cuda", torch.float32), ("lora", "bf16-weights", "cpu", torch.bfloat16),
        ("full", "bf16", "cuda", torch.float32), ("full", "auto", "cuda", torch.float32), ("full", "bf16-weights", "cuda", torch.bfloat16),
    ],
)  # fmt: skip
def test_the_base_is_held_in_what_the_forward_pass_is_cast_to_if_it_is_not_trained(method, precision, device, dtype):
    assert held_in(FAMILIES[0], Finetune(method=method, precision=precision), device) == dtype


@pytest.mark.parametrize(("can", "dtype"), [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx512_bf16": False}, None)])
def test_a_cpu_computes_in_bfloat16_where_it_is_faster(can: dict[str, bool], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert autocast_dtype(FAMILIES[0], "auto", "cpu") == dtype
    assert held_in(FAMILIES[0], Finetune(method="lora"), "cpu") == (dtype or torch.float32)
    assert autocast_dtype(FAMILIES[0], "fp32", "cpu") is None


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_flow_is_trained_in_float32_by_a_gpu_that_has_no_bfloat16(family: Family, monkeypatch: pytest.MonkeyPatch):
    """In float16 it would overflow, as it would in drawing."""
    monkeypatch.setattr("raybooth.method.has_bfloat16", lambda: False)
    half = None if family.half == "bfloat16" else torch.float16
    assert autocast_dtype(family, "auto", "cuda") == half
    assert held_in(family, Finetune(method="lora"), "cuda") == (half or torch.float32)
    assert autocast_dtype(family, "fp16", "cuda") == torch.float16


@pytest.mark.parametrize("lora", [Lora(rank=4), Lora(rank=4, dropout=0.3), Lora(rank=2, dora=True)], ids=["lora", "dropout", "dora"])
def test_adapters_that_take_their_inputs_as_they_come_learn_the_same_bits(lora: Lora):
    """PEFT's float32 copies of them are cast back by autocast, and kept for the backward pass."""

    def learnt(copies: bool) -> tuple[dict[str, torch.Tensor], int]:
        family, loaded = adapted(toys.made("sdxl"), lora=lora)
        spared: list[Any] = [m for part in loaded.modules.values() for m in part.modules() if not getattr(m, "cast_input_dtype_enabled", True)]
        for layer in spared if copies else ():
            layer.cast_input_dtype_enabled = True
        return list(taught(toys.made("sdxl"), family, loaded))[-1].state().tensors, len(spared)

    (own, spared), (theirs, _) = learnt(copies=False), learnt(copies=True)
    assert spared, "with DoRA those of the text encoders, which stay plain"
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[k], theirs[k]) for k in own)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("lora", [Lora(rank=4), Lora(rank=2, dora=True)], ids=["lora", "dora"])
def test_float32_adapters_on_a_bf16_base_learn(tmp_path: Path, name: str, lora: Lora):
    folder = toys.made(name)
    family, loaded = adapted(folder, lora=lora)
    parameters = [p for m in loaded.modules.values() for p in m.parameters()]
    before = [p.clone() for p in parameters]
    steps = list(taught(folder, family, loaded, ema=0.5))
    kept = steps[-1].state().tensors
    assert np.isfinite(losses(steps)).all()
    assert {t.dtype for k, t in kept.items() if k.startswith(("weights", "optimizer", "average"))} == {torch.float32}
    adapters = [i for i, p in enumerate(parameters) if p.dtype == torch.float32]
    assert 0 < len(adapters) < len(parameters)
    assert any(not torch.equal(before[i], parameters[i]) for i in adapters)
    assert all(p.dtype == torch.bfloat16 and torch.equal(b, p) for i, (b, p) in enumerate(zip(before, parameters, strict=True)) if i not in adapters)
    # The same on float32 weights, which are cast in every layer: as near as bfloat16 is.
    plain = load(family, folder, family.trainable(True))
    make_ready(family, plain, LORA, lora, 0)
    assert losses(steps) == pytest.approx(losses(taught(folder, family, plain, ema=0.5)), rel=0.02)
    save_adapters(family, loaded.modules, tmp_path / "lora")
    load_adapters(family, whole(folder)[1], tmp_path / "lora")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("lora", [Lora(rank=4), Lora(rank=2, dora=True)], ids=["lora", "dora"])
def test_new_adapters_change_no_bit_of_what_a_bf16_base_draws(name: str, lora: Lora):
    folder = toys.made(name)
    family = family_of(folder)
    loaded = load(family, folder, (family.denoiser, "vae", *family.encoders), torch.bfloat16)
    plain = draw(family, loaded)
    add_adapters(family, loaded, family.trainable(True), lora, seed=0)
    assert all((a == b).all() for a, b in zip(plain, draw(family, loaded), strict=True))
    exact = draw(*whole(folder))
    apart = [np.abs(a.astype(float) - b).mean() / 255 for a, b in zip(plain, exact, strict=True)]
    assert max(apart) < 0.02, apart


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_bf16_base_draws_with_adapters_too_small_for_its_weights(tmp_path: Path, name: str):
    """Merged, most of what they change would be rounded away."""
    folder = toys.made(name)
    make_adapters(folder, tmp_path, seed=1, scale=2e-3)
    family, exact = whole(folder)
    loaded = load(family, folder, tuple(exact.modules), torch.bfloat16)
    places = {n: m for n, m in exact.modules[family.denoiser].named_modules() if isinstance(m, torch.nn.Linear) and n.endswith("attn.to_q")}
    assert places
    x = torch.randn(64, next(iter(places.values())).in_features)
    plain = {n: m(x) for n, m in places.items()}
    for one in (exact, loaded):
        load_adapters(family, one, tmp_path)
    for n, before in plain.items():
        wanted = exact.modules[family.denoiser].get_submodule(n)(x) - before
        layer: Any = loaded.modules[family.denoiser].get_submodule(n)
        found = layer.lora_B["default_0"](layer.lora_A["default_0"](x.bfloat16())).float() * layer.scaling["default_0"]
        assert not layer.merged
        assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("name", MAKERS)
def test_a_bf16_base_teaches_its_own_adapters(name: str):
    """Before they have moved they say what it says without them; it is asked in a smaller batch, so that a last bit may differ."""
    folder, how = toys.made(name), LORA.model_copy(update={"text_encoder": False})
    family, loaded = adapted(folder, how)
    priors = [s.metrics.prior for s in taught(folder, family, loaded, how, teacher=True) if s.metrics]
    assert priors[0] < priors[-1] / 10


def test_a_run_on_a_bf16_base_goes_on_in_the_same_bits():
    folder = toys.made("sd3")
    steps = list(taught(folder, *adapted(folder), steps=4))
    half = next(s for s in taught(folder, *adapted(folder), steps=4) if s.number == 2).state()
    rest = list(taught(folder, *adapted(folder), start=half, steps=4))
    assert [s.metrics for s in rest] == [s.metrics for s in steps[2:]]


def test_workers_agree_on_a_bf16_base():
    """DistributedDataParallel sends the frozen weights to all once and waits for the adapters' gradients alone."""
    folder = toys.made("sdxl")
    alone = losses(taught(folder, *adapted(folder)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        together = losses(taught(folder, *adapted(folder), wrap=partial(DistributedDataParallel, **DDP)))
    finally:
        dist.destroy_process_group()
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_flows_are_drawn_in_bfloat16_where_there_is_any(name: str):
    family = family_of(toys.made(name))
    flow = name in ("sd3", "flux")
    assert drawing_dtype(family, "cuda", bfloat16=True) == (torch.bfloat16 if flow else torch.float16)
    assert drawing_dtype(family, "cuda", bfloat16=False) == (torch.float32 if flow else torch.float16)
    assert drawing_dtype(family, "cpu", bfloat16=True) == torch.float32


@pytest.mark.parametrize("name", MAKERS)
def test_what_draws_and_encodes_is_loaded_so(name: str, monkeypatch: pytest.MonkeyPatch):
    """But for the VAE."""
    monkeypatch.setattr("raybooth.method.drawing_dtype", lambda family, device, bfloat16: drawing_dtype(family, "cuda", bfloat16=True))
    folder = toys.made(name)
    family = family_of(folder)
    loaded = for_inference(folder, (family.denoiser, "vae", *family.encoders))
    types = {part: next(module.parameters()).dtype for part, module in loaded.modules.items()}
    assert types.pop("vae") == torch.float32
    assert set(types.values()) == {getattr(torch, family.half)}


@pytest.mark.parametrize(
    ("own", "others", "common"),
    [
        (torch.bfloat16, ["bf16"], "bf16"), (torch.bfloat16, ["fp16"], "fp16"), (torch.float16, ["bf16"], "fp16"), (torch.bfloat16, ["fp32", "fp16"], "fp32"),
        (None, ["bf16"], "fp32"),
    ],
)  # fmt: skip
def test_workers_on_unlike_devices_take_one_precision(monkeypatch: pytest.MonkeyPatch, own: torch.dtype | None, others: list[str], common: str):
    order = ["fp32", "fp16", "bf16"]
    group = SimpleNamespace(device=torch.device("cpu"), least=lambda mine: min(mine, *(order.index(o) for o in others)))
    monkeypatch.setattr("raybooth.finetune_job.autocast_dtype", lambda *_: own)
    assert in_common(FAMILIES[0], Finetune(), group).precision == common
    for said in ("fp16", "bf16-weights"):
        assert in_common(FAMILIES[0], Finetune(precision=said), group).precision == said


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_what_was_trained_in_bf16_weights_opens_in_plain_diffusers_without_a_word(tmp_path: Path, name: str):
    """transformers would open the text encoder in bfloat16, and diffusers the UNet in float32: they would not go together."""
    base = toys.made(name)
    family = family_of(base)
    loaded = load(family, base, family.trainable(True), torch.bfloat16)
    values = {k: v.float() for k, v in loaded.modules["text_encoder"].state_dict().items()}
    save(base, loaded.modules, tmp_path)
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path)
    pipe("a dog", num_inference_steps=1, height=32, width=32, output_type="np")
    assert all(torch.equal(v, values[k]) for k, v in pipe.text_encoder.state_dict().items())
