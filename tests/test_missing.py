"""What has gone from a storage, and what stands where something of raybooth's belongs: named, with what to do about it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from stored import on_mini

from raybooth.errors import RayboothError
from raybooth.session import Run
from raybooth.verbs import do

STAGES = ["prepare", "class-images", "encode"]


@pytest.fixture
def run(tmp_path: Path, photos: Path, in_process: None) -> Run:
    run = on_mini(tmp_path / "run", photos)
    with run:
        do(run, STAGES[:2])
    return run


def emptied(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(("spoil", "said"), [(Path.unlink, "is missing"), (emptied, "is no file")])
@pytest.mark.parametrize(("picture", "verb"), [("class-images/00001.png", "class-images"), ("instance-images/01.png", "prepare")])
def test_a_picture_that_has_gone_is_named_with_the_verb_that_makes_it(run: Run, picture: str, verb: str, spoil: Callable[[Path], None], said: str):
    path = run.workspace.root / picture
    before = path.read_bytes()
    spoil(path)
    with pytest.raises(RayboothError, match=rf"^{picture} {said} in the storage .* run 'raybooth {verb} --storage .*' to make it again"), run:
        do(run, ["encode"])
    if path.is_dir():
        path.rmdir()
    with run:
        do(run, [verb, "encode"])
    assert path.read_bytes() == before


def test_a_latent_that_has_gone_is_named_before_a_worker_starts(run: Run, monkeypatch: pytest.MonkeyPatch):
    with run:
        do(run, ["encode"])
    latent = max((run.workspace.root / "latents").glob("*.safetensors"))
    latent.unlink()
    groups: list[object] = []
    monkeypatch.setattr("raybooth.cluster.fit.run_group", lambda *a, **k: groups.append(a))
    with pytest.raises(RayboothError, match=rf"^latents/{latent.name} is missing .* run 'raybooth encode --storage .*'"), run:
        do(run, ["finetune"])
    assert not groups
    with run:
        do(run, ["encode"])
    assert latent.is_file()


def test_another_file_that_has_gone_is_said_to_be_missing(run: Run):
    """Where no stage asks for it by its name."""
    (run.workspace.root / "class-images" / "00000.png").unlink()
    with pytest.raises(RayboothError, match=r"lacks a file .*'raybooth run' makes again what is missing \(.*00000\.png\)"), run:
        run.images("class")


@pytest.mark.parametrize("name", ["base-model", "instance-images", "class-images", "base-model/unet"])
def test_a_file_that_stands_in_the_place_of_a_folder_is_named(tmp_path: Path, photos: Path, in_process: None, name: str):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"the user's")
    run = on_mini(tmp_path / "run", photos)
    said = r"In .*/base-model unet is in the way of outputs" if "/" in name else f"^{path} is in the way of a folder of raybooth's: move it elsewhere"
    with pytest.raises(RayboothError, match=said), run:
        do(run, STAGES)
    assert path.read_bytes() == b"the user's"
    path.unlink()
    with run:
        do(run, STAGES[:1])
