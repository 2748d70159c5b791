"""Stages one by one: each takes what the one before made by the present settings, and nothing else."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from toys import make_sd2

from raybooth import config
from raybooth.errors import RayboothError
from raybooth.session import Run
from raybooth.stages import class_images, encode, finetune, generate, prepare

SMALL = ("prior.images=4", "prior.steps=2", "finetune.steps=2", "generate.steps=2", "generate.images_per_prompt=1", "generate.prompts={subject} at night")


def run(storage: Path, base: Path, photos: Path, *sets: str, class_name: str = "dog") -> Run:
    subject: dict[str, Any] = {"photos": [str(photos)], "class": class_name}
    return Run(config.load(None, [*SMALL, *sets], subject=subject, base={"model": str(base)}, storage=str(storage)), quiet=True)


@pytest.fixture
def stored(tmp_path: Path, toy: Path, photos: Path, in_process: None) -> Path:
    made = run(tmp_path / "run", toy, photos)
    for stage in (prepare, class_images, encode):
        stage(made)
    return tmp_path / "run"


@pytest.mark.parametrize("stage", [encode, finetune])
@pytest.mark.parametrize(
    ("changed", "told", "verb"),
    [
        ("base.resolution=64", "instance-images are of another resolution", "prepare"),
        ("subject.crops=1", "instance-images are of another crops", "prepare"),
        ("subject.flip=true", "instance-images are of another crops", "prepare"),
        ("prior.prompt=photo of a cat", "class-images are of another prompt", "class-images"),
        ("subject.class=cat", "class-images are of another prompt", "class-images"),
        ("prior.steps=3", "class-images are of another steps", "class-images"),
        ("seed=1", "class-images are of another seed", "class-images"),
        ("prior.images=5", "There are not prior.images = 5 class-images yet", "class-images"),
    ],
)
def test_pictures_of_other_settings_are_not_trained_on(stored: Path, toy: Path, photos: Path, changed: str, told: str, verb: str, stage: Any):
    here = f"--storage {stored}"
    with pytest.raises(RayboothError, match=f"{told}.*: run 'raybooth {verb} {here}' first, or 'raybooth run {here}' for all"):
        stage(run(stored, toy, photos, changed))


def test_class_pictures_of_another_base_are_not_trained_on(stored: Path, tmp_path: Path, photos: Path):
    made = run(stored, make_sd2(tmp_path / "other"), photos)
    prepare(made)
    with pytest.raises(RayboothError, match=r"class-images are of another model than the present: run 'raybooth class-images --storage .*' first"):
        encode(made)


def test_class_pictures_that_were_stopped_while_they_moved_in_are_those_that_are_trained_on(
    stored: Path, toy: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    old = {p.name for p in (stored / "latents").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("raybooth.workspace.move_in", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            class_images(run(stored, toy, photos, "prior.steps=3"))
    encode(run(stored, toy, photos, "prior.steps=3"))
    assert len({p.name for p in (stored / "latents").glob("*.safetensors")} - old) == 4


def test_of_more_class_pictures_the_first_are_trained_on(stored: Path, toy: Path, photos: Path, fits_here: None):
    finetune(run(stored, toy, photos))
    first = (stored / "fine-tuned-model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    class_images(run(stored, toy, photos, "prior.images=6"))
    shutil.rmtree(stored / "fine-tuned-model")
    encode(run(stored, toy, photos))
    finetune(run(stored, toy, photos))
    assert (stored / "fine-tuned-model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first


@pytest.mark.parametrize(("file", "verb"), [("class-images/00001.png", "class-images"), ("instance-images/01.png", "prepare")])
@pytest.mark.parametrize("broken", [False, True])
def test_a_picture_that_was_changed_is_not_encoded(stored: Path, toy: Path, photos: Path, file: str, verb: str, broken: bool):
    shutil.rmtree(stored / "latents")
    other = (stored / file).with_name("02.png" if "instance" in file else "00002.png").read_bytes()
    (stored / file).write_bytes(b"no picture" if broken else other)
    with pytest.raises(RayboothError, match=f"{file} .* changed or damaged: run 'raybooth {verb} --storage .*' to make it again"):
        encode(run(stored, toy, photos))
    {"prepare": prepare, "class-images": class_images}[verb](run(stored, toy, photos))
    encode(run(stored, toy, photos))


def test_a_model_that_was_made_elsewhere_and_did_not_arrive_is_none(stored: Path, toy: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    """The workers' machines have another folder of that path."""
    monkeypatch.setattr("raybooth.cluster.fit.run_group", lambda *_, **how: {"history": []})
    with pytest.raises(RayboothError, match="it must be a mount that all machines have"):
        finetune(run(stored, toy, photos))
    assert not (stored / "fine-tuned-model" / "manifest.json").exists()


def test_words_that_the_model_was_not_taught_are_told(stored: Path, toy: Path, photos: Path, fits_here: None, capsys: pytest.CaptureFixture[str]):
    finetune(run(stored, toy, photos))
    made = run(stored, toy, photos, class_name="cat")
    made.quiet = False
    generate(made)
    assert "the model was taught 'photo of unqtkn dog', and the subject is 'photo of unqtkn cat' by now" in capsys.readouterr().err


def test_pictures_that_nobody_makes(stored: Path, toy: Path, photos: Path):
    made = run(stored, toy, photos)
    assert len(made.images("instance")) == 3
    with pytest.raises(RayboothError, match=r"no pictures 'foo' .* name 'instance'"):
        made.images("foo")
    with pytest.raises(RayboothError, match=r"run 'raybooth generate --storage .*' first"):
        made.images("output")
