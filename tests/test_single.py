"""A checkpoint in one file, in the key layout of the original Stable Diffusion code, as a base model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import MAKERS

from raybooth import config
from raybooth.base_model import prepare_base
from raybooth.cli import main
from raybooth.errors import RayboothError
from raybooth.session import Run

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3"}
OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1", "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv", "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
}  # fmt: skip
VAE: list[tuple[str, Any]] = [
    (r"(en|de)coder\.mid_block\.resnets\.(\d)", lambda m: f"{m[1]}coder.mid.block_{int(m[2]) + 1}"),
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{1 - int(m[1])}.block.{m[2]}"),
    (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{1 - int(m[1])}.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]


def unet_key(key: str) -> str:
    outer = next(k for k in OUTER if key.startswith(f"{k}."))
    inner = key.removeprefix(f"{outer}.").replace("conv_shortcut", "skip_connection")
    if "resnets" in outer:
        part, rest = inner.split(".", 1)
        inner = f"{RESNET.get(part, part)}.{rest}"
    return f"model.diffusion_model.{OUTER[outer]}.{inner}"


def vae_key(key: str) -> str:
    for pattern, replacement in VAE:
        key = re.sub(pattern, replacement, key)
    return f"first_stage_model.{key}"


def in_one_file(folder: Path, target: Path) -> Path:
    """The toy of SD 1.x's shape, two levels of one layer each, with the original code's names."""
    tensors = {unet_key(k): v for k, v in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items()}
    tensors |= {vae_key(k): v for k, v in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items()}
    text = load_file(folder / "text_encoder/model.safetensors")
    tensors |= {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    save_file(tensors, target)
    return target


@pytest.fixture
def toy_file(tmp_path: Path) -> tuple[Path, Path]:
    toy = MAKERS["sd1"](tmp_path / "toy")
    return toy, in_one_file(toy, tmp_path / "model.safetensors")


def prepared(storage: Path, model: Path, **base: str) -> Path:
    made = config.load(None, [], subject={"class": "dog"}, base={"model": str(model), **base}, storage=str(storage))
    with Run(made, quiet=True) as run:
        prepare_base(run)
    return storage / "base-model"


def test_it_becomes_the_folder_that_it_was_made_from(tmp_path: Path, toy_file: tuple[Path, Path]):
    toy, file = toy_file
    folder = prepared(tmp_path / "run", file, configuration=str(toy))
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        ours, theirs = load_file(folder / f"{part}.safetensors"), load_file(toy / f"{part}.safetensors")
        if part.startswith("text_encoder"):  # the toy's was built and saved by transformers 5, without what every older reader looks for
            theirs = {f"text_model.{k}": v for k, v in theirs.items()}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    prepared(tmp_path / "run", file, configuration=str(toy))
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_without_its_configuration_it_says_what_is_missing(tmp_path: Path, toy_file: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RayboothError, match=r"base\.configuration"):
        prepared(tmp_path / "run", toy_file[1])


def test_half_precision_stays_half(tmp_path: Path, toy_file: tuple[Path, Path]):
    toy, file = toy_file
    save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, file)
    folder = prepared(tmp_path / "run", file, configuration=str(toy))
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert {t.dtype for t in load_file(folder / f"{part}.safetensors").values() if t.is_floating_point()} == {torch.float16}


def test_another_configuration_in_the_same_place_counts(tmp_path: Path, toy_file: tuple[Path, Path]):
    """And one that has gone since does not: the model is in the storage."""
    toy, file = toy_file
    prepared(tmp_path / "run", file, configuration=str(toy))
    path = toy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    for _ in range(2):
        folder = prepared(tmp_path / "run", file, configuration=str(toy))
        assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
        shutil.rmtree(toy, ignore_errors=True)


@pytest.mark.parametrize(
    ("more", "without", "told"),
    [
        ([], "cond_stage_model.", "has no text encoder in it, so it is a part of a model"),
        (["edm_vpred.sigma_max"], None, "noise as EDM has it"),
        (["lora_unet_x.lora_down.weight"], None, "is a LoRA and no model"),
    ],
)
def test_files_that_are_no_whole_model_are_refused(tmp_path: Path, toy_file: tuple[Path, Path], more: list[str], without: str | None, told: str):
    toy, file = toy_file
    held = {k: v for k, v in load_file(file).items() if not (without and k.startswith(without))}
    save_file(held | {name: torch.zeros(1) for name in more}, file)
    with pytest.raises(RayboothError, match=told):
        prepared(tmp_path / "run", file, configuration=str(toy))


def test_a_file_of_a_kind_that_comes_with_two_predictions_asks_which(tmp_path: Path):
    """diffusers takes every Stable Diffusion 2.x for one that predicts a velocity."""
    file = tmp_path / "model.safetensors"
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: torch.zeros(1, 1024), "cond_stage_model.model.logit_scale": torch.zeros(1)}, file)
    with pytest.raises(RayboothError, match=r"does not say whether it predicts noise .* or a velocity .*: set base\.configuration"):
        prepared(tmp_path / "run", file)


def test_another_architectures_configuration_is_refused(tmp_path: Path, toy_file: tuple[Path, Path], capsys: pytest.CaptureFixture[str], photos: Path):
    other = MAKERS["sdxl"](tmp_path / "other")
    arguments = ["prepare", "--photos", str(photos), "--class", "dog", "--base", str(toy_file[1]), "--storage", str(tmp_path / "run")]
    assert main([*arguments, "--set", f"base.configuration={other}"]) == 2
    assert "does not fit the configuration" in capsys.readouterr().err


def test_a_file_that_is_cut_off_is_named(tmp_path: Path, toy_file: tuple[Path, Path]):
    toy, file = toy_file
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RayboothError, match=r"model\.safetensors are cut off"):
        prepared(tmp_path / "run", file, configuration=str(toy))


def test_a_pickled_one_is_refused_with_a_configuration_too(tmp_path: Path, toy_file: tuple[Path, Path]):
    """diffusers would open it."""
    toy, _ = toy_file
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, file)
    with pytest.raises(RayboothError, match=r"model\.ckpt is not a \.safetensors file"):
        prepared(tmp_path / "run", file, configuration=str(toy))


def test_a_configuration_without_its_files_does_not_fit(tmp_path: Path, toy_file: tuple[Path, Path]):
    toy, file = toy_file
    (toy / "unet" / "config.json").unlink()
    with pytest.raises(RayboothError, match="does not fit the configuration"):
        prepared(tmp_path / "run", file, configuration=str(toy))
