"""Fine-tuning that is killed and goes on ends in the bits of the run that was not. RAYBOOTH_KILLS=20 kills that many times."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from stored import alone
from test_pipeline import LONGER as SETTINGS
from test_pipeline import apart, call, command, contents
from toys import make_sd, make_sd3

from raybooth import config, finetune_job
from raybooth.cli import main
from raybooth.errors import RayboothError

pytestmark = pytest.mark.usefixtures("ray")
KILLS = int(os.environ.get("RAYBOOTH_KILLS", "2"))
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
BEFORE = ("instance-images", "base-model", "class-images", "latents")


def with_stages_before(unbroken: Path, storage: Path) -> None:
    for stage in BEFORE:
        shutil.copytree(unbroken / stage, storage / stage)


def started(storage: Path, toy: Path, photos: Path, **more) -> subprocess.Popen[str]:
    """A fine-tuning that has written its next checkpoint, or has ended."""
    had = newest(storage)
    process = subprocess.Popen(
        command("finetune", storage, toy, photos, **SETTINGS, **more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while newest(storage) == had and process.poll() is None:
        time.sleep(0.01)
    return process


def newest(storage: Path) -> str:
    return max((p.name for p in (storage / "checkpoints").glob("[!.]*")), default="")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in "".join(p.cmdline())]


def test_kills_at_random_moments_change_nothing(tmp_path: Path, unbroken: Path, toy: Path, photos: Path):
    with_stages_before(unbroken, tmp_path)
    rng, kills = random.Random(KILLS), 0
    while kills < KILLS:
        process = started(tmp_path, toy, photos)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:  # it was done before it could be killed: once more from the beginning
            assert process.returncode == 0
            assert contents(tmp_path / "fine-tuned-model") == contents(unbroken / "fine-tuned-model")
            shutil.rmtree(tmp_path / "fine-tuned-model")
            shutil.rmtree(tmp_path / "checkpoints")
            continue
        if kills % 2 and (workers := workers_of(process)):
            workers[0].kill()  # the group starts again by itself
            kills += 1
            _, said = process.communicate(timeout=200)
            assert process.returncode == 0, said
            assert "Traceback" not in said
            assert "a worker was lost, the group starts again" in said
            assert "goes on from the checkpoint of step" in said
        else:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    call("finetune", tmp_path, toy, photos, **SETTINGS)
    assert contents(tmp_path / "fine-tuned-model") == contents(unbroken / "fine-tuned-model")


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(tmp_path: Path, unbroken: Path, toy: Path, photos: Path):
    with_stages_before(unbroken, tmp_path)
    process = started(tmp_path, toy, photos)
    started_by_it = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(started_by_it, timeout=20)[1]  # nothing of Ray is left running
    said = call("finetune", tmp_path, toy, photos, **SETTINGS)
    assert "goes on from the checkpoint of step" in said
    assert contents(tmp_path / "fine-tuned-model") == contents(unbroken / "fine-tuned-model")


def test_two_workers_become_one_midway(tmp_path: Path, unbroken: Path, toy: Path, photos: Path):
    """Rows are dealt anew, the batch stays: the same weights within float tolerance."""
    with_stages_before(unbroken, tmp_path)
    process = started(tmp_path, toy, photos, cluster__workers=2)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    said = call("finetune", tmp_path, toy, photos, **SETTINGS)
    assert "goes on from the checkpoint of step" in said
    assert apart(tmp_path, unbroken) < 0.02


def test_adapters_go_through_all_stages(tmp_path: Path, unbroken: Path, toy: Path, photos: Path):
    """LoRA taught by the base's own predictions: no class pictures, a small file, and pictures of the subject from it."""
    how = {"finetune__method": "lora", "prior__method": "base-prediction", "lora__rank": 4, "finetune__text_encoder": False}
    call("run", tmp_path, toy, photos, **how)
    assert not (tmp_path / "class-images").exists()
    assert [p.name for p in sorted((tmp_path / "fine-tuned-model").iterdir())] == ["manifest.json", "pytorch_lora_weights.safetensors"]
    assert len(list((tmp_path / "output-images").glob("photo-*.png"))) == 4
    readings = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(readings) == 4
    flops = [r["flops_per_second"] / r["images_per_second"] for r in readings[1:]]  # of a picture
    assert flops == pytest.approx(flops[:1] * 3)
    assert flops[0] > 1e6
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_flow_with_trained_encoders_goes_through_all_stages(tmp_path: Path, photos: Path):
    """Its prompts are encoded beforehand, for T5's share; the fine-tuning trains both CLIPs without T5."""
    call("run", tmp_path / "run", make_sd3(tmp_path / "sd3"), photos, prior__images=2)
    assert len(list((tmp_path / "run" / "latents").glob("text-*.safetensors"))) == 2
    base, tuned = (tmp_path / "run" / stage for stage in ("base-model", "fine-tuned-model"))
    same = {part: (base / part / "model.safetensors").read_bytes() == (tuned / part / "model.safetensors").read_bytes() for part in ENCODERS}
    assert same == {"text_encoder": False, "text_encoder_2": False, "text_encoder_3": True}
    assert len(list((tmp_path / "run" / "output-images").glob("photo-*.png"))) == 4


def test_prompts_that_are_not_encoded_yet_are_asked_for(tmp_path: Path, unbroken: Path, toy: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    """The text encoder was to be trained, and now is not."""
    with_stages_before(unbroken, tmp_path)
    assert main(command("finetune", tmp_path, toy, photos, finetune__text_encoder=False)[3:]) == 2
    assert "run 'raybooth encode --storage " in capsys.readouterr().err


def test_latents_of_another_base_model_are_not_trained_on(tmp_path: Path, unbroken: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    with_stages_before(unbroken, tmp_path)
    other = make_sd(tmp_path / "other", act="gelu")
    for stage in ("prepare", "class-images"):
        assert main(command(stage, tmp_path, other, photos)[3:]) == 0
    assert main(command("finetune", tmp_path, other, photos)[3:]) == 2
    assert "The latents do not belong to the present base model and pictures: run 'raybooth encode --storage " in capsys.readouterr().err


def test_a_disk_that_is_full_at_a_reading_is_said(tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch):
    """In the loop of a worker itself: before the first checkpoint nothing else is written."""
    with_stages_before(unbroken, tmp_path)
    made = config.load(unbroken / "config.json")
    rows = {"instance": sorted(p.name for p in (tmp_path / "latents").glob("*.safetensors"))[:3], "class": []}
    loop = finetune_job.finetuner(
        str(tmp_path), "fine-tuned-model/new", "key", rows, {"instance": made.subject.prompt, "class": made.class_prompt},
        made.prior, made.finetune.model_copy(update={"trackers": []}), made.lora, 0, False,
    )  # fmt: skip

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("raybooth.log.write_atomically", full)
    said = list[dict[str, Any]]()
    with pytest.raises(RayboothError, match="is full: free some space"):
        loop(alone(), said.append)
    assert said == [{"start": 0}]
