"""All stages on a toy model, by the command line: skipping, going on, killing, workers, storages."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from raybooth.cli import main

pytestmark = pytest.mark.usefixtures("ray")

SMALL = {
    "finetune.precision": "fp32",  # in which two workers and one are to be the same within float tolerance, on any machine
    "prior.images": 10, "prior.steps": 3, "finetune.steps": 4, "finetune.batch": 2, "finetune.lr": 1e-3, "finetune.log_every": 1,
    "generate.prompts": ["photo of {subject} in the snow", "photo of {subject} at night"], "generate.images_per_prompt": 2, "generate.steps": 3,
    "cluster.sample_batch": 2, "cluster.samplers": 1,
}  # fmt: skip

LONGER = {"finetune__steps": 80, "finetune__checkpoint_every": 7, "finetune__log_every": 10, "finetune__ema": 0.9, "finetune__schedule": "cosine"}
"""A fine-tuning long enough to be killed in its middle."""


def command(verb: str, storage: Path | str, toy: Path, photos: Path, **settings) -> list[str]:
    values = SMALL | {k.replace("__", "."): v for k, v in settings.items()}
    sets = [part for k, v in values.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    return [sys.executable, "-m", "raybooth", verb, "--photos", str(photos), "--class", "dog", "--base", str(toy), "--storage", str(storage), *sets]


def call(verb: str, storage: Path | str, toy: Path, photos: Path, **settings) -> str:
    """The command in this process, by the Ray that the tests share: no time for a start. Returns what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(command(verb, storage, toy, photos, **settings)[3:])
    assert status == 0, said.getvalue()
    assert "Traceback" not in said.getvalue()
    return said.getvalue()


def call_as_people_do(verb: str, storage: Path, toy: Path, photos: Path) -> str:
    """The command in a process of its own, with its own Ray."""
    done = subprocess.run(command(verb, storage, toy, photos), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a stage made, but the manifest's facts on speed."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"}


def history(storage: Path) -> list[dict[str, float]]:
    return json.loads((storage / "fine-tuned-model" / "manifest.json").read_text())["facts"]["history"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, toy: Path, photos: Path) -> Path:
    """An unbroken run, the reference of all tests here."""
    storage = tmp_path_factory.mktemp("unbroken")
    call_as_people_do("run", storage, toy, photos)
    return storage


def test_every_stage_leaves_what_it_should(made: Path):
    assert len(list((made / "instance-images").glob("0*.png"))) == 3
    assert len(list((made / "class-images").glob("000*.png"))) == 10
    assert len(list((made / "output-images").glob("photo-of-unqtkn-dog-*.png"))) == 4
    assert all((made / s / "contact-sheet.png").exists() for s in ("instance-images", "class-images", "output-images"))
    with Image.open(made / "class-images" / "00007.png") as image:
        assert image.info["prompt"] == "photo of a dog"
        assert image.info["seed"].isdigit()
        assert len(image.info["model"]) == 64
        told = json.loads((made / "class-images" / "manifest.json").read_text())["facts"]
        assert told["rows"].keys() == set(told["pictures"])
        assert told["rows"]["00007.png"] == {"prompt": image.info["prompt"], "seed": int(image.info["seed"])}
    rows = [load_file(p) for p in (made / "latents").glob("*.safetensors")]
    assert sum(r.keys() == {"mean", "std"} for r in rows) == 13
    assert len(rows) == 13  # a trained text encoder encodes the prompts itself


def test_the_fine_tuned_model_opens_in_plain_diffusers_and_draws_the_same(made: Path):
    from raybooth.noise import normal

    pipe = StableDiffusionPipeline.from_pretrained(made / "fine-tuned-model")
    pipe.set_progress_bar_config(disable=True)
    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for path in sorted((made / "output-images").glob("photo-of-*.png"))[:2]:
        with Image.open(path) as image:
            ours, seed, prompt = np.asarray(image, float), int(image.info["seed"]), image.info["prompt"]
        latents = normal((4, 16, 16), seed, "latents")[None]
        theirs = pipe(prompt, latents=latents, num_inference_steps=3, guidance_scale=7.5, output_type="np", height=32, width=32).images[0]
        assert np.abs(ours - theirs * 255).max() <= 0.6


def named(file: Path) -> dict[str, torch.Tensor]:
    """A file's tensors, a text encoder's without what all but transformers 5 put before their names."""
    return {k.removeprefix("text_model."): v for k, v in load_file(file).items()}


def test_the_weights_moved(made: Path):
    for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        before, after = (named(made / stage / part / file) for stage in ("base-model", "fine-tuned-model"))
        assert any(not torch.equal(before[k], after[k]) for k in before)
    same = "vae/diffusion_pytorch_model.safetensors"
    assert (made / "base-model" / same).read_bytes() == (made / "fine-tuned-model" / same).read_bytes()


def test_the_same_command_again_does_nothing_and_needs_no_ray(made: Path, toy: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("raybooth.cluster.session.connected")
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.is_file() and p.parent != made}
    said = call("run", made, toy, photos)
    assert said.count("up to date") == 6
    assert before == {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.is_file() and p.parent != made}


def test_more_pictures_are_added_and_another_setting_draws_anew(tmp_path: Path, made: Path, toy: Path, photos: Path):
    call("prepare", tmp_path, toy, photos)
    call("class-images", tmp_path, toy, photos, prior__images=3)
    first = contents(tmp_path / "class-images")
    stamp = (tmp_path / "class-images" / "00001.png").stat().st_mtime_ns
    (tmp_path / "class-images" / "00002.png").unlink()  # a lost one is drawn again, alone in its batch
    call("class-images", tmp_path, toy, photos)
    more = contents(tmp_path / "class-images")
    assert (tmp_path / "class-images" / "00001.png").stat().st_mtime_ns == stamp
    assert more == contents(made / "class-images")  # in other batches than in one go, and the same files
    assert all(more[k] == v for k, v in first.items() if k[0].isdigit())
    call("class-images", tmp_path, toy, photos, prior__prompt="picture of a {class}")
    assert not set(more.values()) & set(contents(tmp_path / "class-images").values())


def apart(storage: Path, reference: Path) -> float:
    """How far two runs' UNets lie from one another, as a share of how far the reference's has moved from the base model's."""
    name = "fine-tuned-model/unet/diffusion_pytorch_model.safetensors"
    ours, theirs, base = load_file(storage / name), load_file(reference / name), load_file(reference / name.replace("fine-tuned", "base"))
    distance = torch.stack([(ours[k] - theirs[k]).norm() for k in theirs]).norm()
    return float(distance / torch.stack([(base[k] - theirs[k]).norm() for k in theirs]).norm())


def test_two_workers_draw_the_same_files_and_learn_the_same(tmp_path: Path, made: Path, toy: Path, photos: Path):
    """In two passes each, too: a row at a time."""
    call("run", tmp_path, toy, photos, cluster__samplers=2, cluster__workers=2, finetune__accumulate=2)
    assert contents(tmp_path / "class-images") == contents(made / "class-images")
    assert contents(tmp_path / "latents") == contents(made / "latents")
    for ours, theirs in zip(history(tmp_path), history(made), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert apart(tmp_path, made) < 0.02


def test_a_run_killed_three_times_ends_as_the_unbroken_one_to_the_bit(tmp_path: Path, made: Path, toy: Path, photos: Path):
    """SIGKILL to the driver as soon as a stage has written something, in three stages; the same command goes on with the rest."""
    drawn: dict[Path, int] = {}  # what there was at each kill, and when it was written
    for stage in ("class-images", "latents", "output-images"):
        process = subprocess.Popen(command("run", tmp_path, toy, photos), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 200
        while not list((tmp_path / stage).glob(".partial-*/[!.]*")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / stage / "manifest.json").exists()
        there = {tmp_path / stage / p.name: p.stat().st_mtime_ns for p in (tmp_path / stage).glob(".partial-*/[!.]*")}
        assert there
        drawn |= there
    call("run", tmp_path, toy, photos)
    for name in ("class-images", "latents", "fine-tuned-model", "output-images"):
        assert contents(tmp_path / name) == contents(made / name), name
    assert all(path.stat().st_mtime_ns == when for path, when in drawn.items() if "sheet" not in path.name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_batch_systems_signal_stop_cleanly(tmp_path: Path, toy: Path, photos: Path, number: signal.Signals):
    process = subprocess.Popen(command("run", tmp_path, toy, photos, prior__images=400), stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "class-images").glob(".partial-*/*.png")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert "***" not in said  # the native stack that Ray's core prints


def test_without_prior_preservation_there_are_no_class_rows(tmp_path: Path, toy: Path, photos: Path):
    call("run", tmp_path, toy, photos, prior__images=0, finetune__text_encoder=False)
    assert not (tmp_path / "class-images").exists()
    assert all(row["prior"] == 0 for row in history(tmp_path))
    name = "text_encoder/model.safetensors"
    before, after = named(tmp_path / "base-model" / name), named(tmp_path / "fine-tuned-model" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    idle = {"prior__weight": 0.3, "prior__distill": True, "prior__prompt": "a {class}", "finetune__text_encoder_lr": 1e-6}  # what nothing follows from
    assert "fine-tuned-model: up to date" in call("run", tmp_path, toy, photos, prior__images=0, finetune__text_encoder=False, **idle)


def test_a_run_in_python_and_in_a_remote_storage(tmp_path: Path, made: Path, toy: Path, photos: Path):
    import fsspec

    import raybooth

    sections: dict = {"subject": {"photos": str(photos), "class": "dog"}, "base": {"model": str(toy)}, "storage": f"memory://{tmp_path.name}/run"}
    for key, value in SMALL.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    run = raybooth.run(raybooth.Config(**sections))
    assert [im.size for im in run.images("output")] == [(32, 32)] * 4
    assert contents(run.model_folder) == contents(made / "fine-tuned-model")
    fs = fsspec.filesystem("memory")
    assert fs.exists(f"/{tmp_path.name}/run/fine-tuned-model/manifest.json")
    there = {f.split("/class-images/")[1]: fs.cat_file(f) for f in fs.find(f"/{tmp_path.name}/run/class-images") if not f.endswith("manifest.json")}
    assert there == contents(made / "class-images")
