"""The encoders of the scores: from folders, whole and broken ones, and what is kept of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from raybooth import config, encoders
from raybooth.encoder_files import prepare_encoders
from raybooth.errors import RayboothError
from raybooth.mini import FOLDER
from raybooth.session import Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both of mini's, as a user's own."""
    for part in ("vit", "clip"):
        shutil.copytree(FOLDER / part, tmp_path / part)
    return tmp_path


def run_of(folder: Path, **models: str) -> Run:
    chosen = {"dino": str(folder / "vit"), "clip": str(folder / "clip")} | models
    return Run(config.load(None, [], subject={"class": "dog"}, base={"model": "mini"}, evaluate=chosen, storage=str(folder / "run")), quiet=True)


def test_one_that_changed_in_its_folder_is_taken_anew(folder: Path):
    with run_of(folder) as run:
        prepare_encoders(run)
        before = run.model_digest("encoders")
        (folder / "vit" / "notes.json").write_text("{}")
        prepare_encoders(run)
        assert run.model_digest("encoders") != before


def test_what_was_copied_serves_when_its_folder_has_gone(folder: Path):
    with run_of(folder) as run:
        prepare_encoders(run)
        before = run.model_digest("encoders")
        shutil.rmtree(folder / "vit")
        prepare_encoders(run)
        assert run.model_digest("encoders") == before
    with run_of(folder, dino=str(folder / "other")) as run, pytest.raises(RayboothError, match="is no folder that is there"):
        prepare_encoders(run)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def another_kind(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "siglip"}))


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("vit/model.safetensors", lambda p: p.rename(p.with_name("pytorch_model.bin")), "has no model.safetensors, and pickled weights are refused"),
    ("vit/model.safetensors", lambda p: p.rename(p.with_name("model.safetensors.index.json")), "has its weights in several files"),
    ("vit/model.safetensors", cut_off, "are cut off"),
    ("vit/config.json", Path.unlink, "has no config.json"),
    ("vit/config.json", lambda p: p.write_text("{"), "is damaged"),
    ("vit/config.json", another_kind, "is a siglip, and evaluate.dino must be one of vit"),
    ("clip/config.json", another_kind, "is a siglip, and evaluate.clip must be one of clip"),
    ("clip/preprocessor_config.json", Path.unlink, "has no preprocessor_config.json"),
    ("clip/tokenizer.json", Path.unlink, "has no vocabulary"),
]


@pytest.mark.parametrize(("name", "break_it", "sentence"), BROKEN)
def test_a_broken_one_is_refused_before_anything_is_drawn(folder: Path, name: str, break_it: Callable[[Path], object], sentence: str):
    break_it(folder / name)
    with run_of(folder) as run, pytest.raises(RayboothError, match=sentence):
        prepare_encoders(run)
    assert not (folder / "run" / "encoders" / "manifest.json").exists()


@pytest.mark.parametrize(("part", "opened"), [("vit", encoders.vit), ("clip", encoders.clip)])
def test_weights_that_are_missing_are_not_made_up(folder: Path, part: str, opened: Callable[[Path], object]):
    """transformers would draw them at random."""
    file = folder / part / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != next(k for k in tensors if "encoder" in k and k.endswith("weight"))}, file, {"format": "pt"})
    with pytest.raises(RayboothError, match="lacks the weights of"):
        opened(folder / part)


def other_size(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 16, "width": 16}}))


def other_width(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 64}))


def larger_vocabulary(path: Path) -> None:
    held = json.loads(path.read_text())
    held["model"]["vocab"] = {word: number + 10_000 for word, number in held["model"]["vocab"].items()}
    path.write_text(json.dumps(held))


def all_nan(path: Path) -> None:
    save_file({k: v * float("nan") for k, v in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "break_it", "told"),
    [
        ("vit/preprocessor_config.json", other_size, r"files that do not go together \(.*\): copy or download"),
        ("vit/config.json", other_width, r"weights of another shape than its config.json says \(.*\): copy or download"),
        ("vit/model.safetensors", all_nan, "numbers that are not finite"),
        ("clip/model.safetensors", all_nan, "numbers that are not finite"),
        ("clip/tokenizer.json", larger_vocabulary, r"files that do not go together \(.*index.*\): copy or download"),
    ],
)
def test_files_that_do_not_go_together_are_a_sentence(folder: Path, name: str, break_it: Callable[[Path], object], told: str):
    break_it(folder / name)
    with pytest.raises(RayboothError, match=told) as refused:  # noqa: PT012
        if name.startswith("vit"):
            encoders.vit(folder / "vit")([Image.new("RGB", (64, 64))])
        else:
            encoders.clip(folder / "clip")[1](["photo of a dog"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_with_and_without_registers(tmp_path: Path, registers: int):
    """The class token, and the patches without the registers, of another size than mini's."""
    from PIL import Image
    from transformers import AutoConfig, AutoModel, ViTImageProcessor

    kind = "dinov2_with_registers" if registers else "dinov2"
    settings = {"num_register_tokens": registers} if registers else {}
    made = AutoModel.from_config(
        AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, **settings)
    )
    made.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    image = Image.effect_mandelbrot((80, 60), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    found = encoders.vit(tmp_path)([image])
    pixels = ViTImageProcessor.from_pretrained(tmp_path)(images=[image], return_tensors="pt").pixel_values
    with torch.inference_mode():
        tokens = torch.nn.functional.normalize(made.eval()(pixels).last_hidden_state, dim=-1)
    assert found["patches"].shape == (1, 16, 32)
    torch.testing.assert_close(found["dino"], tokens[:, 0])
    torch.testing.assert_close(found["patches"], tokens[:, -16:])
