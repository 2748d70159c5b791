"""Stages one by one: each takes what the one before made by the present settings, and nothing else."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from toys import make_sd2

from raybooth import config
from raybooth.drawing import output_rows
from raybooth.errors import RayboothError
from raybooth.session import Run
from raybooth.stages import class_images, encode, finetune, generate, prepare
from raybooth.verbs import do

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


def test_what_the_model_does_not_read_of_a_prompt_is_told(tmp_path: Path, toy: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    """And what it would not read of the subject is refused: it would learn another prompt than is asked of it later."""
    long = "photo of a large and beautiful old house on the beach in the rain at night behind a car and a tree beside a cup, and {subject} in front"
    made = run(tmp_path / "run", toy, photos, f"generate.prompts=['{long}', '{{subject}} at night']")
    made.quiet = False
    prepare(made)
    [told] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prompts:")]
    length = json.loads((toy / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    assert f"this model reads {length} tokens, and not the end: '" in told
    assert told.endswith("unqtkn dog in front'")
    assert "beautiful" not in told.rpartition("the end: ")[2]
    with pytest.raises(RayboothError, match=r"'photo of unqtkn very .*' would be cut off: shorten subject.token"):
        prepare(run(tmp_path / "other", toy, photos, class_name="very " * 18 + "dog"))


def test_a_base_whose_tokenizer_does_not_say_how_much_is_read(tmp_path: Path, toy: Path, photos: Path, in_process: None):
    """Its text encoder does."""
    base = Path(shutil.copytree(toy, tmp_path / "base"))
    said = json.loads((base / "tokenizer" / "tokenizer_config.json").read_text())
    said.pop("model_max_length")
    (base / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(said))
    for folder, model in (("one", base), ("two", toy)):
        made = run(tmp_path / folder, model, photos)
        prepare(made)
        class_images(made)
    one, two = (sorted((tmp_path / folder / "class-images").glob("0*.png")) for folder in ("one", "two"))
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


@pytest.mark.parametrize("verb", ["generate", "finetune", "evaluate"])
def test_another_base_than_the_storages_is_not_taken_for_it(stored: Path, tmp_path: Path, photos: Path, verb: str):
    """What it has drawn would be drawn again, by the defaults of a model that it does not have."""
    before = {p: p.read_bytes() for p in stored.rglob("*.png")}
    with pytest.raises(RayboothError, match=r"holds a run on .*, and not on .*other: leave the base out, or give another --storage"):
        do(run(stored, make_sd2(tmp_path / "other"), photos), [verb])
    assert {p: p.read_bytes() for p in before} == before


def test_the_same_base_in_another_place_is_the_storages(stored: Path, toy: Path, tmp_path: Path, photos: Path, fits_here: None):
    """As on another machine, which goes on with a storage that was copied."""
    do(run(stored, Path(shutil.copytree(toy, tmp_path / "elsewhere")), photos), ["finetune"])
    assert (stored / "fine-tuned-model" / "model_index.json").exists()


def test_a_folder_whose_name_is_no_text_is_said(tmp_path: Path, toy: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    here = os.fsencode(tmp_path) + b"/l\xe4nd"
    os.mkdir(here)
    monkeypatch.chdir(os.fsdecode(here))
    shutil.copytree(photos, "photos")
    with pytest.raises(RayboothError, match=r"subject\.photos = 'photos' lies in a folder whose name is not in UTF-8"):
        prepare(run(tmp_path / "run", toy, Path("photos")))
    with pytest.raises(RayboothError, match="storage = 'run' lies in a folder whose name is not in UTF-8"):
        prepare(run(Path("run"), toy, photos))


def test_a_picture_is_called_something_whatever_its_prompt(tmp_path: Path, toy: Path, photos: Path):
    made = run(tmp_path, toy, photos, "generate.prompts=['雪の中の犬']")
    assert output_rows(made)[0]["name"].startswith("picture-")


def test_pictures_that_nobody_makes(stored: Path, toy: Path, photos: Path):
    made = run(stored, toy, photos)
    assert len(made.images("instance")) == 3
    with pytest.raises(RayboothError, match=r"no pictures 'foo' .* name 'instance'"):
        made.images("foo")
    with pytest.raises(RayboothError, match=r"run 'raybooth generate --storage .*' first"):
        made.images("output")


def test_class_pictures_that_nobody_wants_are_said_to_be_none(stored: Path, toy: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    made, said = run(stored, toy, photos, "prior.images=0"), list[str]()
    monkeypatch.setattr(made, "say", said.append)
    class_images(made)
    assert said == ["class-images: none are wanted (prior.images = 0)"]
