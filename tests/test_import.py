"""A LoRA from elsewhere is drawn with as its file says, whatever its layout; what does not fit is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished import CLOSE, SAMPLING, apart, fine_tuned, opened, ours, run_of, theirs
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from toys import MAKERS, make_sd

import raybooth
from raybooth.base_model import prepare_base
from raybooth.cli import main
from raybooth.config import load
from raybooth.drawing import output_rows
from raybooth.errors import RayboothError
from raybooth.families import Loaded, family_of, foreign
from raybooth.families.foreign import merge, read
from raybooth.families.lora import WEIGHTS, add_adapters, has_adapters, load_adapters, save_adapters
from raybooth.families.lowrank import hollow
from raybooth.families.parts import load as load_parts
from raybooth.jobs import drawing_digest, sampler
from raybooth.sections import Lora
from raybooth.session import Run
from raybooth.stages import generate

Tensors = dict[str, torch.Tensor]
TE = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The base model of a family, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = MAKERS[name](tmp_path_factory.mktemp(name) / "base")
        return made[name]

    return get


def imported(storage: Path, base: Path, file: Path) -> Run:
    return raybooth.import_lora(file, run_of(storage, base).config)


@pytest.mark.parametrize(("name", "to"), [*((n, "lora") for n in MAKERS), *((n, "kohya") for n in ("sd1", "sd2", "sdxl"))])
def test_what_was_exported_comes_back(bases: Callable[[str], Path], tmp_path: Path, name: str, to: str):
    storage = fine_tuned(tmp_path / "run", bases(name), Lora(rank=4, alpha=2.0))
    file = next(Path(raybooth.export(storage, to)).glob("*.safetensors"))
    run = imported(tmp_path / "back", bases(name), file)
    assert apart(ours(storage), ours(tmp_path / "back")) <= CLOSE
    facts = run.facts("fine-tuned-model")
    assert (facts["imported"], facts["rank"]) == (file.name, 4)


def update(weight: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) for a weight."""
    g = torch.Generator().manual_seed(seed)
    ones = (1,) * (weight.ndim - 2)
    return torch.randn(rank, *weight.shape[1:], generator=g), torch.randn(weight.shape[0], rank, *ones, generator=g) * 0.2


LAYERS = {
    "unet": ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.attentions.0.proj_in", "up_blocks.1.resnets.0.conv1", "conv_out"],
    "text_encoder": [TE],
}


def by_hand(
    base: Path, ranks: list[int], alphas: list[float], layers: dict[str, list[str]] = LAYERS
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor, float]], Any]:
    """Updates of `layers`, each of its own rank and alpha; and the pipeline with them added to its weights."""
    pipe, made = opened(base), {}
    names = [(part, layer) for part, names in layers.items() for layer in names]
    for i, (part, layer) in enumerate(names):
        weight = getattr(pipe, part).get_submodule(layer).weight
        down, up = update(weight, ranks[i], i)
        weight.data += (alphas[i] / ranks[i] * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        made[f"{part}.{layer}"] = down, up, alphas[i]
    return made, pipe


def kohya(made: dict[str, tuple[torch.Tensor, torch.Tensor, float]]) -> Tensors:
    tensors: Tensors = {}
    for name, (down, up, alpha) in made.items():
        key = name.replace("text_encoder.", "lora_te_text_model_").replace("unet.", "lora_unet_").replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def test_kohyas_layout_with_ranks_and_alphas_of_each_layer(bases: Callable[[str], Path], tmp_path: Path):
    made, pipe = by_hand(bases("sd1"), [4, 2, 3, 1, 4], [4.0, 1.0, 6.0, 0.5, 8.0])
    save_file(kohya(made), tmp_path / "theirs.safetensors")
    imported(tmp_path / "run", bases("sd1"), tmp_path / "theirs.safetensors")
    wanted = theirs(pipe, bases("sd1"))
    assert apart(ours(tmp_path / "run"), wanted) <= CLOSE
    assert apart(wanted, theirs(opened(bases("sd1")), bases("sd1"))) > 5 * CLOSE


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_small_alpha_is_put_to_values_of_few_bits_in_float32(kept: torch.dtype):
    """In the file's own precision they would lose some of them, or all of arithmetic."""
    up = torch.linspace(3e-3, 2, 16).reshape(2, 8).to(kept)
    read = foreign._scaled({"x.lora_down.weight": torch.ones(8, 4).to(kept), "x.lora_up.weight": up, "x.alpha": torch.tensor(0.25)})
    torch.testing.assert_close(read["x.lora_up.weight"].double(), up.double() * 0.25 / 8, rtol=1e-7, atol=0)


def test_diffusers_old_layout(bases: Callable[[str], Path], tmp_path: Path):
    made, pipe = by_hand(bases("sd1"), [3] * 5, [3.0] * 5)  # it knows no alpha
    save_file(old_layout(made), tmp_path / "theirs.safetensors")
    imported(tmp_path / "run", bases("sd1"), tmp_path / "theirs.safetensors")
    assert apart(ours(tmp_path / "run"), theirs(pipe, bases("sd1"))) <= CLOSE


def old_layout(made: dict[str, tuple[torch.Tensor, torch.Tensor, float]]) -> Tensors:
    tensors: Tensors = {}
    for name, (down, up, _) in made.items():
        if "to_k" in name:
            key = name.replace(".to_k", ".processor.to_k_lora")
        elif name.endswith("q_proj"):
            key = name.replace("text_encoder.", "text_encoder.text_model.").replace("q_proj", "to_q_lora")
        else:
            key = f"{name}.lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return tensors


def test_pefts_layout_says_its_alpha_beside_itself(bases: Callable[[str], Path], tmp_path: Path):
    made, _ = by_hand(bases("sd1"), [2] * 5, [4.0] * 5)
    tensors: Tensors = {f"base_model.model.{TE}.lora_{k}.weight": t for k, t in zip("AB", made[f"text_encoder.{TE}"][:2], strict=True)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    family = family_of(bases("sd1"))
    low = read(family, hollow(family, bases("sd1")), tmp_path / "adapter_model.safetensors")
    assert list(low.parts) == ["text_encoder"]
    down, up = low.parts["text_encoder"][f"text_model.{TE}"]
    assert torch.equal(down, made[f"text_encoder.{TE}"][0])
    assert torch.equal(up, 2 * made[f"text_encoder.{TE}"][1])


def test_sdxl_in_the_names_of_its_first_code(bases: Callable[[str], Path], tmp_path: Path):
    """As sd-scripts trains SDXL: input_blocks_4_1 there is down_blocks_1_attentions_0 here (one layer a block in the toy)."""
    base = bases("sdxl")
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    pipe = opened(base)
    weight = pipe.unet.get_submodule(layer).weight
    down, up = update(weight, 2, 0)
    key = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}, tmp_path / "theirs.safetensors")
    weight.data += up @ down
    imported(tmp_path / "run", base, tmp_path / "theirs.safetensors")
    assert apart(ours(tmp_path / "run"), theirs(pipe, base)) <= CLOSE


def spoilt(how: str, tensors: Tensors) -> Tensors:
    first = next(iter(tensors)).partition(".")[0]
    if how == "shape":
        tensors[f"{first}.lora_down.weight"] = torch.zeros(4, 7)
    elif how == "layer":
        return {k.replace("attentions_0_transformer", "attentions_9_transformer"): t for k, t in tensors.items()}
    elif how == "dora":
        tensors[f"{first}.dora_scale"] = torch.ones(16, 1)
    elif how == "lokr":
        tensors[f"{first}.lokr_w1"] = torch.ones(2, 2)
    elif how == "empty":
        tensors[f"{first}.lora_down.weight"], tensors[f"{first}.lora_up.weight"] = torch.zeros(0, 32), torch.zeros(32, 0)
    elif how == "ranks":
        tensors[f"{first}.lora_up.weight"] = torch.zeros(32, 5)
    elif how == "nan":
        tensors[f"{first}.lora_down.weight"][0, 0] = torch.nan
    elif how == "none":
        return {"unet.something.weight": torch.ones(2, 2)}
    return tensors


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("shape", r"is for a weight of \(32, 7\), the model\'s is \(32, 32\)"),
        ("layer", "which the model does not have"),
        ("dora", "is a DoRA"),
        ("lokr", "of no layout that diffusers knows"),
        ("none", "holds no LoRA"),
        ("empty", "has matrices without values"),
        ("ranks", "are of ranks 4 and 5"),
        ("nan", "holds values that are not finite"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_model(bases: Callable[[str], Path], tmp_path: Path, how: str, named: str):
    made, _ = by_hand(bases("sd1"), [4] * 5, [4.0] * 5)
    save_file(spoilt(how, kohya(made)), tmp_path / "theirs.safetensors")
    with pytest.raises(RayboothError, match=named):
        imported(tmp_path / "run", bases("sd1"), tmp_path / "theirs.safetensors")
    assert not (tmp_path / "run" / "fine-tuned-model" / "manifest.json").exists()
    assert (tmp_path / "run" / "base-model").exists() == (how in ("shape", "layer", "lokr", "ranks", "nan"))  # what is no LoRA shows before a base is fetched


@pytest.mark.parametrize("pattern", ["(", "([a-z0-9_.]+)+!"])
def test_a_strangers_regular_expressions_are_not_run(bases: Callable[[str], Path], tmp_path: Path, pattern: str):
    """The second one would take longer than anybody waits."""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    told = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 3}}
    tensors = {f"{name}.lora_A.weight": torch.zeros(4, 32), f"{name}.lora_B.weight": torch.zeros(32, 4)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(RayboothError, match="is no layer's name"):
        imported(tmp_path / "run", bases("sd1"), tmp_path / "theirs.safetensors")


def test_another_base_a_damaged_file_and_a_storage_with_a_model_of_its_own(bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made, _ = by_hand(bases("sd1"), [4] * 5, [4.0] * 5)
    file = tmp_path / "theirs.safetensors"
    save_file(kohya(made), file)
    for other in ("sdxl", "sd3"):
        with pytest.raises(RayboothError, match=r"does not fit the base model|of no layout"):
            imported(tmp_path / other, bases(other), file)
    own = fine_tuned(tmp_path / "own", bases("sd1"))
    before = {p: p.read_bytes() for p in own.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(RayboothError, match="was fine-tuned there"):
        imported(own, bases("sd1"), file)
    assert before == {p: p.read_bytes() for p in own.rglob("*") if p.is_file() and p.name != ".lock"}
    theirs = imported(tmp_path / "theirs", bases("sd1"), file)
    for verb in (raybooth.run, raybooth.finetune):
        with pytest.raises(RayboothError, match="holds a LoRA that was imported, and fine-tuning would replace it"):
            verb(theirs.config)
    file.write_bytes(file.read_bytes()[:-100])
    for path, named in ((file, "not readable as safetensors"), (tmp_path / "nowhere.safetensors", "There is no LoRA file")):
        assert main(["import", str(path), "--base", str(bases("sd1")), "--class", "dog", "--storage", str(tmp_path / "run")]) == 2
        assert named in capsys.readouterr().err


def test_the_storage_says_how_to_generate_and_a_sampler_of_it_draws(bases: Callable[[str], Path], tmp_path: Path):
    base = bases("sd1")
    made, pipe = by_hand(base, [4] * 5, [2.0] * 5)
    file, storage = tmp_path / "theirs.safetensors", tmp_path / "run"
    save_file(kohya(made), file)
    assert main(["import", str(file), "--base", str(base), "--class", "dog", "--token", "xyz", "--storage", str(storage)]) == 0
    config = load(storage / "config.json")
    with Run(config, quiet=True) as run:
        row = output_rows(run)[0]
        draw = sampler(str(storage), "fine-tuned-model", SAMPLING, 1, drawing_digest(run.workspace, "fine-tuned-model"))
    assert row["prompt"] == "photo of xyz dog"
    with Image.open(io.BytesIO(draw([row])[0])) as image:
        drawn = np.asarray(image) / 255.0
    assert apart(drawn, theirs(pipe, base, row["prompt"], row["seed"])) <= CLOSE


def test_imported_again_it_takes_other_settings(bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made, _ = by_hand(bases("sd1"), [4] * 5, [4.0] * 5)
    file, storage = tmp_path / "theirs.safetensors", tmp_path / "run"
    save_file(kohya(made), file)
    for token in ("unqtkn", "sks"):
        assert main(["import", str(file), "--base", str(bases("sd1")), "--class", "dog", "--token", token, "--storage", str(storage)]) == 0
        assert load(storage / "config.json").subject.token == token
    assert "fine-tuned-model: up to date" in capsys.readouterr().err


def test_the_same_adapters_on_another_base_are_another_model(bases: Callable[[str], Path], tmp_path: Path):
    """What was drawn by the first is not taken for the second's; and adapters do not draw on a base that they were not made for."""
    made, _ = by_hand(bases("sd1"), [4] * 5, [4.0] * 5)
    file, storage, other = tmp_path / "theirs.safetensors", tmp_path / "run", tmp_path / "other"
    save_file(kohya(made), file)
    make_sd(other, act="gelu")
    digests = [drawing_digest(imported(storage, base, file).workspace, "fine-tuned-model") for base in (bases("sd1"), other)]
    assert digests[0] != digests[1]
    with run_of(storage, bases("sd1")) as run:
        prepare_base(run)
        with pytest.raises(RayboothError, match=r"fine-tuned-model in the storage .* belongs to another base model"):
            generate(run)


def test_its_file_does_not_depend_on_the_process_that_wrote_it(bases: Callable[[str], Path], tmp_path: Path):
    """PEFT has targets as a set, whose order is each process's own."""
    made, _ = by_hand(bases("sd1"), [4] * 5, [4.0] * 5)
    save_file(kohya(made), tmp_path / "theirs.safetensors")
    imported(tmp_path / "run", bases("sd1"), tmp_path / "theirs.safetensors")
    with safe_open(tmp_path / "run" / "fine-tuned-model" / WEIGHTS, "np") as held:
        told = json.loads(held.metadata()["lora_adapter_metadata"])
    targets = [names for key, names in told.items() if key.endswith("target_modules")]
    assert targets
    assert all(names == sorted(names) for names in targets)


def test_bf16_weights_keep_small_adapters_beside_them(bases: Callable[[str], Path], tmp_path: Path):
    """Added to the weights they would be rounded away."""
    storage = fine_tuned(tmp_path / "run", bases("sd1"), Lora(rank=4))
    base, file = storage / "base-model", storage / "fine-tuned-model" / WEIGHTS
    family = family_of(base)
    parts = family.trainable(text_encoder=True)
    of_file, of_run = (load_parts(family, base, parts, torch.bfloat16) for _ in range(2))
    merge(family, of_file, file)
    load_adapters(family, of_run, file.parent)
    drawn = []
    for loaded in (of_file, of_run):
        assert has_adapters(loaded.modules["unet"])
        with torch.no_grad():
            z, t = torch.ones(1, 4, 16, 16, dtype=torch.bfloat16), torch.tensor([500])
            drawn.append(loaded.modules["unet"](z, t, torch.ones(1, 7, 32, dtype=torch.bfloat16)).sample)
    assert (drawn[0] - drawn[1]).abs().max() < 0.02


def test_in_bf16_a_small_dora_is_the_one_that_was_trained(bases: Callable[[str], Path], tmp_path: Path):
    """Its effect on a layer's output, against the same in float32. Merged, or by magnitudes in bfloat16, most of it would be rounding."""
    family, g = family_of(bases("sd3")), torch.Generator().manual_seed(1)

    def denoiser(dtype: torch.dtype) -> Loaded:
        return load_parts(family, bases("sd3"), (family.denoiser,), torch.bfloat16).to(dtype)

    trained = denoiser(torch.float32)
    add_adapters(family, trained, (family.denoiser,), Lora(rank=2, dora=True), seed=0)
    for name, p in trained.modules[family.denoiser].named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=g) * 1e-3
    save_adapters(family, trained.modules, tmp_path)
    full, half = denoiser(torch.float32), denoiser(torch.bfloat16)
    outputs = []
    x = torch.randn(64, 32, generator=g)
    with torch.no_grad():
        for loaded in (full, half):
            layer: Any = loaded.modules[family.denoiser].get_submodule("transformer_blocks.0.attn.to_q")
            before = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
            load_adapters(family, loaded, tmp_path)
            layer = loaded.modules[family.denoiser].get_submodule("transformer_blocks.0.attn.to_q").float()  # or its output would be rounded
            outputs.append(layer(x) - before)
    assert outputs[0].abs().max() > 1e-5
    assert (outputs[1] - outputs[0]).norm() < 0.02 * outputs[0].norm()
