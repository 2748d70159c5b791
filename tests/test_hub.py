"""The hub's path, against a server on loopback with huggingface_hub itself as the client."""

import contextlib
import errno
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet
import pytest
from huggingface_hub import constants
from toys import make_flux

from raybooth.cli import main
from raybooth.mini import FOLDER
from tests.hub_server import COMMIT, PROPOSED, Hub, serving

UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(toy: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
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
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield served


@dataclass
class Done:
    returncode: int
    stderr: str


def prepare(hub: Hub, storage: Path, *more: str, base: str = "me/toy", photos: str = "hf://me/dog") -> Done:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(["prepare", "--photos", photos, "--class", "dog", "--base", base, "--storage", str(storage), *more])
    return Done(status, said.getvalue())


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


OTHER = "1" * 40


@pytest.mark.parametrize("cut", [50_000, 10_000_000], ids=["within the unet", "after the unet"])
def test_what_has_come_of_one_commit_does_not_stay_in_another(hub: Hub, tmp_path: Path, cut: int):
    hub.cut_after = cut
    assert prepare(hub, tmp_path / "run").returncode == 2
    unet = hub.folders["models/me/toy"] / "unet" / UNET
    newer = unet.read_bytes()[:-1] + b"!"
    unet.write_bytes(newer)
    hub.cut_after, hub.commit = None, OTHER
    again = prepare(hub, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    base = tmp_path / "run" / "base-model"
    manifest = json.loads((base / "manifest.json").read_text())
    assert manifest["facts"]["commit"] == OTHER
    assert (base / "unet" / UNET).read_bytes() == newer
    assert {n for n in manifest["outputs"] if "unet/" in n} == {"unet/config.json", f"unet/{UNET}"}


def test_weights_of_another_precision_that_have_come_come_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They lose their variant's name when all have come; a stop after that, while gigabytes are hashed, knows them again."""
    unet = hub.folders["models/me/toy"] / "unet"
    (unet / UNET).rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("raybooth.stage.describe", Mock(side_effect=KeyboardInterrupt))
        assert prepare(hub, tmp_path / "run").returncode == 130
    hub.asked.clear()
    again = prepare(hub, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert not [name for name in fetched(hub) if name.endswith(".safetensors")]
    assert (tmp_path / "run" / "base-model" / "unet" / UNET).read_bytes() == (unet / "diffusion_pytorch_model.fp16.safetensors").read_bytes()


def test_a_file_that_ends_early_is_gone_on_with(hub: Hub, tmp_path: Path):
    """As through a proxy that does not say how long it is."""
    hub.short = 50_000
    first = prepare(hub, tmp_path / "run")
    assert first.returncode == 2
    assert "ended early" in first.stderr
    hub.asked.clear()
    assert prepare(hub, tmp_path / "run").returncode == 0
    assert "bytes=50000-" in [asked for _, _, asked in hub.asked]


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


ENCODERS = ["--set=evaluate.select=balance", "--set=evaluate.dino=mini"]


@pytest.mark.parametrize(
    ("more", "base", "source", "named"),
    [
        (["--set=base.revision=nope"], "me/toy", "hf://me/dog", "no revision 'nope' on HUB: check base.revision"),
        ([], "me/other", "hf://me/dog", "There is no model me/other on HUB, or it is private: check base.model"),
        ([], "me/toy", "hf://me/cat", "There is no dataset me/cat on HUB, or it is private: check subject.photos"),
        ([], "me/toy", "hf://me/dog@nope", "The dataset me/dog has no revision 'nope' on HUB: check subject.photos"),
        ([], "me/a dog", "hf://me/dog", "'me/a dog' is neither a folder nor a name on the hub: write base.model as owner/name"),
        ([], "me/toy", "hf://me/a dog", "'me/a dog' is neither a folder nor a name on the hub: write subject.photos as hf://owner/name"),
        ([*ENCODERS, "--set=evaluate.clip=me/toy@nope"], "me/toy", "hf://me/dog", "has no revision 'nope' on HUB: check evaluate.clip"),
        ([*ENCODERS, "--set=evaluate.clip=me/other"], "me/toy", "hf://me/dog", "There is no model me/other on HUB, or it is private: check evaluate.clip"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: Hub, tmp_path: Path, more: list[str], base: str, source: str, named: str):
    done = prepare(hub, tmp_path / "run", *more, base=base, photos=source)
    assert done.returncode == 2
    assert named.replace("HUB", hub.url) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("status", "error", "body", "told"),
    [
        (200, "", b"<html>Accept the terms of this network</html>", "is not the hub, but a proxy or a login page, perhaps"),
        (200, "", b"{}", "is not the hub"),
        (200, "", b"[]", "is not the hub"),
        (401, "Invalid credentials in Authorization header", b"", "check that HF_TOKEN is a valid token"),
        (403, "", b"", "check that HF_TOKEN is a valid token"),
        (410, "", b"", "no longer has the model me/toy (status 410): ask its owner, or check base.model"),
        (429, "", b"", "asked too often and refuses the model me/toy for a while (status 429): wait some minutes and run the same command again"),
        (503, "", b"", "check the network"),
    ],
)
def test_what_answers_in_place_of_the_hub_is_told_apart(hub: Hub, tmp_path: Path, photos: Path, status: int, error: str, body: bytes, told: str):
    hub.instead = status, error, body
    done = prepare(hub, tmp_path / "run", photos=str(photos))
    assert done.returncode == 2
    assert told in done.stderr
    assert "me/toy" in done.stderr


@pytest.mark.parametrize("file", ["vae/config.json", f"unet/{UNET}"])
@pytest.mark.parametrize(("status", "told"), [(404, "no longer has {} of the model me/toy (status 404)"), (429, "wait some minutes")])
def test_a_file_that_the_hub_does_not_give_is_told_from_a_lost_network(hub: Hub, tmp_path: Path, file: str, status: int, told: str, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of huggingface_hub, which asks again
    hub.refused = {file: status}
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert told.format(file) in done.stderr
    assert "network" not in done.stderr


def test_a_token_with_a_letter_that_no_token_has_is_said_and_not_printed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert "holds a letter that no token has" in done.stderr
    assert "cret" not in done.stderr


def test_a_file_in_the_place_of_the_models_folder_is_not_the_hubs_fault(hub: Hub, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "base-model").write_text("mine")
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert f"{tmp_path / 'run' / 'base-model'} is in the way of a folder" in done.stderr


def test_what_is_no_picture_in_a_dataset_is_skipped_with_its_reason_as_in_a_folder(hub: Hub, tmp_path: Path, photos: Path):
    dog, storage = tmp_path / "dog", tmp_path / "run"
    (dog / "deep [1]").mkdir(parents=True)
    for i, name in enumerate(("a.Jpg", "b.PNG", "deep [1]/c.png")):
        shutil.copyfile(photos / f"{i}.png", dog / name)
    (dog / "README.md").write_text("# dogs")
    (dog / "data.parquet").write_bytes(bytes(99))
    (dog / ".gitattributes").write_text("")
    hub.folders["datasets/me/dog"] = dog
    done = prepare(hub, storage)
    assert done.returncode == 0, done.stderr
    facts = json.loads((storage / "instance-images" / "manifest.json").read_text())["facts"]
    assert [s["name"] for s in facts["sources"]] == ["hf://me/dog/a.Jpg", "hf://me/dog/b.PNG", "hf://me/dog/deep [1]/c.png"]
    assert facts["skipped"] == [
        ["hf://me/dog/.gitattributes", "a hidden file"],
        ["hf://me/dog/README.md", "'.md' is not a picture's file type"],
        ["hf://me/dog/data.parquet", "'.parquet' is not a picture's file type"],
    ]
    assert "skipped hf://me/dog/data.parquet" in done.stderr
    assert not [path for _, path, _ in hub.asked if path.endswith((".md", ".parquet", ".gitattributes"))]
    for gone in (dog / "a.Jpg", dog / "b.PNG", dog / "deep [1]" / "c.png", dog / "data.parquet"):
        gone.unlink()
    assert "no photographs in hf://me/dog; hf://me/dog/.gitattributes: a hidden file; hf://me/dog/README.md" in prepare(hub, tmp_path / "none").stderr


def test_a_dataset_of_parquet_tables_gives_the_pictures_in_them(hub: Hub, tmp_path: Path, photos: Path):
    """As `datasets` writes them: one column of pictures, of which some rows are empty, among others."""
    files = [(photos / f"{i}.png").read_bytes() for i in range(3)]
    dog = tmp_path / "dog"
    (dog / "data").mkdir(parents=True)
    (dog / "README.md").write_text("# dogs")
    parts: list[list[bytes | None]] = [[*files[:2]], [files[2], None]]
    for i, rows in enumerate(parts):
        image = [row and {"bytes": row, "path": "a.png" if i else None} for row in rows]
        table = pyarrow.table({"image": image, "text": ["a dog"] * 2, "box": [{"x": 1, "y": 2}] * 2})
        pyarrow.parquet.write_table(table, dog / "data" / f"train-0000{i}-of-00002.parquet")
    hub.folders["datasets/me/dog"] = dog
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "instance-images" / "manifest.json").read_text())["facts"]
    assert [s["sha256"] for s in facts["sources"]] == [hashlib.sha256(data).hexdigest() for data in files]
    assert facts["sources"][2]["name"] == "hf://me/dog/data/train-00001-of-00002/00000.png"
    assert [name for name, _ in facts["skipped"]] == ["hf://me/dog/README.md"]


@pytest.mark.parametrize(
    ("table", "told"), [(b"PAR1 and no more", "train.parquet is a parquet file that cannot be read"), (None, "There are no photographs in hf://me/dog")]
)
def test_a_table_without_pictures_is_named(hub: Hub, tmp_path: Path, table: bytes | None, told: str):
    dog = tmp_path / "dog"
    dog.mkdir()
    if table:
        (dog / "train.parquet").write_bytes(table)
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a dog"]}), dog / "train.parquet")
    hub.folders["datasets/me/dog"] = dog
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dataset_of_far_too_many_pictures_is_refused_before_they_come(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("raybooth.hub.MOST", 2)
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert "hf://me/dog holds 3 pictures, 0.0 GB: this is no dataset of one subject's photographs" in done.stderr
    assert not [path for _, path, _ in hub.asked if "/resolve/" in path]


@pytest.mark.parametrize("name", ["StableCascadePipeline", None], ids=["another family", "no pipeline"])
def test_a_repository_of_something_else_is_called_by_its_name(hub: Hub, tmp_path: Path, name: str | None):
    index = hub.folders["models/me/toy"] / "model_index.json"
    if name:
        index.write_text(json.dumps({"_class_name": name}))
    else:
        index.unlink()
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert (f"The model me/toy is a {name}" if name else "The repository me/toy has no model_index.json") in done.stderr


def test_an_incomplete_repository_is_refused_before_its_weights_come(hub: Hub, tmp_path: Path):
    part = hub.folders["models/me/toy"] / "unet"
    (part / UNET).rename(part / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    (part / f"{UNET}.index.json").write_text(json.dumps({"weight_map": shards}))
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert "The model me/toy has no unet/diffusion_pytorch_model-00002-of-00002.safetensors" in done.stderr
    assert not [f for f in fetched(hub) if f.endswith(".safetensors")]


def test_a_full_disk_is_not_the_hubs_fault(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("raybooth.hub._append", full)
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert "is over its quota" in done.stderr


def test_pickled_weights_only_are_refused_with_the_way_out(hub: Hub, tmp_path: Path):
    repo = hub.folders["models/me/toy"]
    for file in (repo / "unet").glob("*.safetensors"):
        file.unlink()
    done = prepare(hub, tmp_path / "run")
    assert done.returncode == 2
    assert "only pickled weights in unet/" in done.stderr
    assert "convert" in done.stderr


def test_plan_does_not_answer_for_another_model_than_the_one_asked_for(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert prepare(hub, tmp_path / "run").returncode == 0
    plan = ["plan", "--storage", str(tmp_path / "run")]
    for same in ([], ["--base", "me/toy"]):
        assert main([*plan, *same]) == 0
    for other, told in (
        (["--base", "me/sdxl"], "holds the base model me/toy, and not me/sdxl: prepare this one in another --storage"),
        (["--set=base.revision=fp16"], "holds the base model me/toy, and not me/toy@fp16"),
    ):
        assert main([*plan, *other]) == 2
        assert told in capsys.readouterr().err


def test_token_does_not_put_another_model_in_the_place_of_a_runs(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert prepare(hub, tmp_path / "run").returncode == 0
    token, manifest = ["token", "--storage", str(tmp_path / "run")], tmp_path / "run" / "base-model" / "manifest.json"
    before = manifest.read_bytes()
    assert main([*token, "--base", "mini"]) == 2
    assert "holds a run on me/toy, and not on mini: give another --storage" in capsys.readouterr().err
    assert manifest.read_bytes() == before
    assert main(token) == 0
    for base in ("me/toy", "mini"):  # no run was begun there
        assert main(["token", "--storage", str(tmp_path / "looked"), "--base", base]) == 0
