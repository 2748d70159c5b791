"""Base models whose files are all there and do not fit together: a sentence that names the part, and no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from raybooth import config
from raybooth.errors import RayboothError
from raybooth.session import Run
from raybooth.verbs import do

Spoil = Callable[[Path], object]


def change(name: str, **values: Any) -> Spoil:
    def spoil(model: Path) -> None:
        held = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(held | values))

    return spoil


def without_some_weights(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        tensors = load_file(model / name)
        save_file(dict(sorted(tensors.items())[1:]), model / name, {"format": "pt"})

    return spoil


def with_nan(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        save_file({k: t * float("nan") for k, t in load_file(model / name).items()}, model / name, {"format": "pt"})

    return spoil


def with_more_words(model: Path) -> None:
    """Than the text encoder has embeddings for."""
    file = model / "tokenizer/tokenizer.json"
    held = json.loads(file.read_text())
    vocabulary = held["model"]["vocab"]
    vocabulary |= {f"word{i}</w>": len(vocabulary) + i for i in range(9999)}
    file.write_text(json.dumps(held))


UNET, TEXT, VAE = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
BROKEN: list[tuple[str, Spoil, str]] = [
    ("weights of another name", lambda m: (m / UNET).rename(m / "unet/model.safetensors"), "unet of the model cannot be opened"),
    ("weights of another part", lambda m: shutil.copyfile(m / VAE, m / UNET), "unet of the model cannot be opened"),
    ("weights missing in the UNet", without_some_weights(UNET), "unet of the model cannot be opened"),
    ("weights missing in the text encoder", without_some_weights(TEXT), "text_encoder of the model cannot be opened"),
    ("a class that is not known", change("model_index.json", unet=["diffusers", "NoSuchNet"]), "unet of the model cannot be opened"),
    ("an empty tokenizer", lambda m: [f.write_text("{}") for f in (m / "tokenizer").glob("*.json")], "tokenizer of the model cannot be opened"),
    ("blocks that are not known", change("unet/config.json", down_block_types=["X", "Y"]), "unet of the model cannot be opened"),
    ("a UNet deeper than its weights", change("text_encoder/config.json", num_hidden_layers=9), "text_encoder of the model cannot be opened"),
    ("noise that is not known", change("scheduler/scheduler_config.json", beta_schedule="nope"), "scheduler of the model cannot be opened"),
    ("no timesteps", change("scheduler/scheduler_config.json", num_train_timesteps=0), "scheduler"),
    ("an inpainting model", change("unet/config.json", in_channels=9), "takes 9 channels and the VAE has"),
    ("a text encoder of another model", change("unet/config.json", cross_attention_dim=999), "takes text of width 999"),
    ("latents without a scale", change("vae/config.json", scaling_factor=None), "lack something or hold nonsense"),
    ("a way of solving that is not known", change("scheduler/scheduler_config.json", solver_type="nope"), "scheduler of the model cannot be opened"),
    ("a tokenizer that cannot pad", change("tokenizer/tokenizer_config.json", pad_token=None), "tokenizer of the model cannot be opened"),
    ("a tokenizer without room for words", change("tokenizer/tokenizer_config.json", model_max_length=2), "reads nothing of a prompt"),
    ("words that the text encoder does not know", with_more_words, "tokens, and its text encoder knows"),
    ("a VAE of NaN", with_nan(VAE), "not finite"),
    ("a flow", change("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"), "noise as FlowMatchEulerDiscreteScheduler has it"),
    ("EDM", change("scheduler/scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler"), "noise as EDM"),
    ("weights of four bits", change("unet/config.json", quantization_config={"quant_method": "bitsandbytes"}), "quantised weights in unet/"),
    ("a UNet for few steps", change("unet/config.json", time_cond_proj_dim=256), "distilled to few steps"),
    ("latents of another mean", change("vae/config.json", latents_mean=[0.1]), "latents of another scale"),
    ("brackets without end", lambda m: (m / "unet/config.json").write_text("[" * 100_000), "unet/config.json is damaged"),
]


@pytest.mark.parametrize(("spoil", "named"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
@pytest.mark.usefixtures("in_process")
def test_a_broken_base_is_said(spoil: Spoil, named: str, tmp_path: Path, toy: Path, photos: Path):
    shutil.copytree(toy, tmp_path / "model")
    spoil(tmp_path / "model")
    made = config.load(
        None, ["prior.images=1", "prior.steps=1"], subject={"photos": [str(photos)], "class": "dog"}, base={"model": str(tmp_path / "model")},
        storage=str(tmp_path / "run"),
    )  # fmt: skip
    with Run(made, quiet=True) as run, pytest.raises(RayboothError, match=named):
        do(run, ["prepare", "class-images"])
