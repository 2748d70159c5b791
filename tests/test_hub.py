"""The hub's path, against a server on loopback with huggingface_hub itself as the client."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys import make_flux

from raybooth.mini import FOLDER
from tests.hub_server import COMMIT, PROPOSED, Hub, serving

UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(toy: Path, photos: Path, tmp_path: Path) -> Iterator[Hub]:
    repo = tmp_path / "repo"
    shutil.copytree(toy, repo)
    # What a real repository also holds, and nobody needs.
    (repo / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle" * 3000)
    (repo / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half" * 3000)
    (repo / "sd-v1-4.ckpt").write_bytes(b"pickle" * 3000)
    (repo / "safety_checker").mkdir()
    (repo / "safety_checker" / "model.safetensors").write_bytes(b"x" * 20_000)
    with serving() as served:
        served.folders = {"models/me/toy": repo, "datasets/me/dog": photos}
        yield served


def prepare(hub: Hub, storage: Path, *more: str, base: str = "me/toy", photos: str = "hf://me/dog") -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(storage.parent / "hf")}
    command = [sys.executable, "-m", "raybooth", "prepare", "--photos", photos, "--class", "dog", "--base", base, "--storage", str(storage), *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def fetched(hub: Hub) -> set[str]:
    return {path.split(f"/{COMMIT}/")[1] for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path and "/me/toy/" in path}


def test_only_the_needed_files_at_the_pinned_commit(hub: Hub, tmp_path: Path, toy: Path):
    done = prepare(hub, tmp_path / "run", f"--set=base.revision={COMMIT}")
    assert done.returncode == 0, done.stderr
    assert not {f for f in fetched(hub) if f.endswith((".bin", ".ckpt")) or "fp16" in f or f.startswith("safety_checker")}
    manifest = json.loads((tmp_path / "run" / "base-model" / "manifest.json").read_text())
    assert manifest["facts"]["commit"] == COMMIT
    assert manifest["facts"]["license"] == "creativeml-openrail-m"
    assert (tmp_path / "run" / "base-model" / "unet" / UNET).read_bytes() == (toy / "unet" / UNET).read_bytes()
    assert len(list((tmp_path / "run" / "instance-images").glob("0*.png"))) == 3
    hub.asked.clear()
    assert prepare(hub, tmp_path / "run", f"--set=base.revision={COMMIT}").returncode == 0
    assert not [a for a in hub.asked if "/resolve/" in a[1]]


def test_a_download_that_was_cut_off_goes_on_where_it_was(hub: Hub, tmp_path: Path, toy: Path):
    hub.cut_after = 50_000
    first = prepare(hub, tmp_path / "run")
    assert first.returncode == 2, first.stderr
    assert "run the same command again" in first.stderr
    assert "Traceback" not in first.stderr
    hub.cut_after = None
    hub.asked.clear()
    again = prepare(hub, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert [r for _, path, r in hub.asked if r and r != "bytes=0-0"], "nothing was resumed"
    for part in ("unet", "vae"):
        assert (tmp_path / "run" / "base-model" / part / UNET).read_bytes() == (toy / part / UNET).read_bytes()


def test_a_file_with_another_hash_than_stated_is_refused(hub: Hub, tmp_path: Path):
    hub.lies = {UNET}
    first = prepare(hub, tmp_path / "run")
    assert first.returncode == 2
    assert "another hash" in first.stderr
    assert "Traceback" not in first.stderr
    assert not (tmp_path / "run" / "base-model" / "manifest.json").exists()
    hub.lies = set()
    assert prepare(hub, tmp_path / "run").returncode == 0


@pytest.fixture
def pickled_clip(hub: Hub, tmp_path: Path) -> Hub:
    """mini's CLIP as an old repository has it; its pull request has safetensors."""
    for folder in (tmp_path / "clip", tmp_path / "converted"):
        shutil.copytree(FOLDER / "clip", folder)
    (tmp_path / "clip" / "model.safetensors").rename(tmp_path / "clip" / "pytorch_model.bin")
    hub.folders["models/me/clip"] = tmp_path / "clip"
    return hub


@pytest.mark.parametrize(
    ("author", "clip", "found"),
    [("SFconvertbot", "me/clip", True), ("somebody", "me/clip", False), ("somebody", "me/clip@refs/pr/1", True)],
    ids=["the hub's converter", "anybody", "anybody, by name"],
)
def test_safetensors_in_a_pull_request_are_taken_from_the_hubs_converter_or_when_named(pickled_clip: Hub, tmp_path: Path, author: str, clip: str, found: bool):
    pickled_clip.proposed["models/me/clip"] = author, tmp_path / "converted"
    done = prepare(pickled_clip, tmp_path / "run", "--set=evaluate.select=balance", f"--set=evaluate.clip={clip}", "--set=evaluate.dino=mini")
    assert (done.returncode == 0) == found, done.stderr
    if found:
        manifest = json.loads((tmp_path / "run" / "encoders" / "manifest.json").read_text())
        assert manifest["facts"]["clip"] == PROPOSED
        assert (tmp_path / "run" / "encoders" / "clip" / "model.safetensors").exists()
    else:
        assert "owner/name@refs/pr/3" in done.stderr
        assert "Traceback" not in done.stderr
        assert not [path for _, path, _ in pickled_clip.asked if path.endswith(".bin")]


def test_a_model_that_cannot_do_it_is_refused_before_its_weights_come(hub: Hub, tmp_path: Path):
    hub.folders["models/me/toy"] = make_flux(tmp_path / "flux")
    done = prepare(hub, tmp_path / "run", "--set=generate.scheduler=ddim")
    assert done.returncode == 2
    assert "generate.scheduler = 'ddim' is not possible with FLUX.1" in done.stderr
    assert fetched(hub)
    assert not [f for f in fetched(hub) if f.endswith(".safetensors")]
    assert prepare(hub, tmp_path / "run", "--set=generate.scheduler=euler").returncode == 0
    assert "is not possible with FLUX.1" in prepare(hub, tmp_path / "run", "--set=generate.scheduler=ddim").stderr  # with nothing left to fetch, too


@pytest.mark.parametrize(
    ("more", "base", "photos", "named"),
    [
        (["--set=base.revision=nope"], "me/toy", "hf://me/dog", "no revision 'nope'"),
        ([], "me/other", "hf://me/dog", "There is no model me/other"),
        ([], "me/toy", "hf://me/cat", "There is no dataset me/cat"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: Hub, tmp_path: Path, more: list[str], base: str, photos: str, named: str):
    done = prepare(hub, tmp_path / "run", *more, base=base, photos=photos)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_pickled_weights_only_are_refused_with_the_way_out(hub: Hub, tmp_path: Path):
    repo = hub.folders["models/me/toy"]
    for file in (repo / "unet").glob("*.safetensors"):
        file.unlink()
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert "only pickled weights in unet/" in done.stderr
    assert "convert" in done.stderr
