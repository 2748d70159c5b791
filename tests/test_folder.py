"""What a complete model folder is."""

import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from toys import MAKERS

from raybooth.base_model import needed_of_folder
from raybooth.cli import main
from raybooth.families.folder import needed_files, plain_name


def test_a_part_may_be_a_link(toy: Path, tmp_path: Path):
    folder = shutil.copytree(toy, tmp_path / "model")
    (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    assert needed_of_folder(folder) == needed_of_folder(toy)


def test_a_tokenizer_may_have_its_words_in_two_files(toy: Path, tmp_path: Path):
    folder = shutil.copytree(toy, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "tokenizer" / "merges.txt").write_text("")
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(needed_of_folder(folder))


NET, CLIP = "diffusion_pytorch_model", "model"


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        ([f"{NET}.fp16.safetensors", f"{NET}.safetensors"], [f"{NET}.safetensors"]),
        ([f"{NET}.fp16.safetensors", f"{NET}.fp32.safetensors"], [f"{NET}.fp32.safetensors"]),
        ([f"{NET}.fp8.safetensors", f"{NET}.fp16.safetensors"], [f"{NET}.fp16.safetensors"]),
        ([f"{NET}.ema.safetensors", f"{NET}.non_ema.safetensors"], [f"{NET}.ema.safetensors"]),
        ([f"{NET}.fp16.safetensors", "pytorch_lora_weights.safetensors"], [f"{NET}.fp16.safetensors"]),
        ([f"{NET}.non_ema-00001-of-00001.safetensors", f"{NET}.safetensors.index.non_ema.json", f"{NET}.safetensors"], [f"{NET}.safetensors"]),
        ([f"{CLIP}-00001-of-00001.fp16.safetensors", f"{CLIP}.safetensors.index.fp16.json", "flax_model.msgpack"],
         [f"{CLIP}-00001-of-00001.fp16.safetensors", f"{CLIP}.safetensors.index.fp16.json"]),
    ],
)  # fmt: skip
def test_of_several_kinds_of_weights_one_is_taken(held: list[str], taken: list[str]):
    """The fullest. Its files then have the names that are looked for where no variant is asked for."""
    names = [f"unet/{name}" for name in (*held, "config.json")]
    found = [n for n in needed_files(names, ["unet"], [], "m") if ".safetensors" in n]
    assert found == [f"unet/{name}" for name in taken]
    plain = {plain_name(n) for n in found}
    assert len(plain) == len(found)
    assert not any(mark in n for n in plain for mark in ("fp16", "fp32", "ema"))


@pytest.mark.parametrize(("name", "part"), [("sd3", "text_encoder_3"), ("sdxl", "text_encoder")])
def test_a_model_that_was_saved_without_a_part_is_told_so(name: str, part: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Diffusers allows it: SD 3 without T5, SDXL with its second encoder alone."""
    whole, folder = MAKERS[name](tmp_path / "whole"), tmp_path / "model"
    without = {part: None, part.replace("text_encoder", "tokenizer"): None}
    DiffusionPipeline.from_pretrained(whole, **without).save_pretrained(folder)
    for verb, more in (("prepare", [f"--photos={photos}", f"--storage={tmp_path / 'run'}"]), ("plan", [])):
        assert main([verb, *more, "--class=dog", f"--base={folder}"]) == 2
        said = capsys.readouterr().err
        assert f"has no {part}/" in said
        assert "was saved without that part, which raybooth needs: give the whole model." in said
