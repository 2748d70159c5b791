"""What people do in a bucket besides: files of their own there, and folders that they delete."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from test_checkpoint import KEY, saved
from test_workspace import made

from raybooth.checkpoint import Checkpoints
from raybooth.errors import RayboothError
from raybooth.manifest import MANIFEST
from raybooth.remote import Remote
from raybooth.session import kept_config
from raybooth.workspace import Workspace


class World:
    """A bucket, and machines with a mirror each."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.bucket, self._monkeypatch = tmp_path, tmp_path / "bucket", monkeypatch
        self.uri = f"file://{self.bucket}"

    def on(self, machine: str) -> Workspace:
        self._monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / machine))
        return Workspace(self.uri)

    def there(self, stage: str = "s") -> dict[str, bytes]:
        return {p.relative_to(self.bucket / stage).as_posix(): p.read_bytes() for p in (self.bucket / stage).rglob("*") if p.is_file()}

    def put(self, name: str, data: bytes) -> None:
        (self.bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (self.bucket / name).write_bytes(data)

    def cut_off(self, machine: str, inputs: dict[str, object], at: str, **files: bytes) -> None:
        """A stage whose push dies where it comes to the file `at`."""
        stage = self.on(machine).stage("s", inputs)
        for name, data in files.items():
            stage.write(name, data)
        put = Remote.put

        def dies(remote: Remote, name: str, file: Path) -> None:
            if name == f"s/{at}":
                raise KeyboardInterrupt
            put(remote, name, file)

        with pytest.MonkeyPatch.context() as dying:
            dying.setattr(Remote, "put", dies)
            with pytest.raises(KeyboardInterrupt):
                stage.finish()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


@pytest.mark.parametrize(("name", "theirs"), [("x", b"mine"), ("x", b"their own"), (MANIFEST, b'{"name": "my site"}')], ids=["as long", "longer", "manifest"])
def test_a_users_file_in_the_way_is_named_and_kept(world: World, name: str, theirs: bytes):
    world.put(f"s/{name}", theirs)
    stage = world.on("one").stage("s", {})
    stage.write("x", b"ours")
    with pytest.raises(RayboothError, match=rf"In {world.uri}/s {name} is in the way of outputs"):
        stage.finish()
    assert world.there()[name] == theirs
    (world.bucket / "s" / name).unlink()
    made(world.on("one").stage("s", {}))
    assert world.there().keys() == {"x", MANIFEST}
    assert world.there()["x"] == b"ours"


def test_a_stage_that_has_lost_its_manifest_there_takes_back_what_it_made(world: World):
    made(world.on("one").stage("s", {}), x=b"1", y=b"2")
    (world.bucket / "s" / MANIFEST).unlink()
    again = world.on("one").stage("s", {})
    assert again.missing(["x", "y"]) == ["x", "y"]
    made(again, x=b"1", y=b"2")
    assert world.there().keys() == {"x", "y", MANIFEST}


def test_what_a_push_left_that_was_cut_off_is_nobodys(world: World):
    """By a machine that has gone: another one goes on with other results of the same names, and one name less."""
    made(world.on("one").stage("s", {"a": 0}), old=b"0")
    world.cut_off("one", {"a": 1}, MANIFEST, x=b"1", y=b"1")
    assert {"x", "y"} < world.there().keys()
    made(world.on("two").stage("s", {"a": 2}), x=b"2")
    assert world.there().keys() == {"x", MANIFEST}
    assert world.there()["x"] == b"2"


def test_what_two_pushes_left_that_were_cut_off_is_known_still(world: World):
    world.cut_off("one", {"a": 1}, MANIFEST, x=b"1", y=b"1")
    world.cut_off("two", {"a": 2}, MANIFEST, z=b"2")
    made(world.on("three").stage("s", {"a": 3}), y=b"3")
    assert world.there().keys() == {"y", MANIFEST}


@pytest.mark.parametrize("cut", [False, True])
def test_outputs_of_older_inputs_go_with_the_new_manifest_and_the_users_files_stay(world: World, cut: bool):
    made(world.on("one").stage("s", {"a": 1}), x=b"old", gone=b"old")
    world.put("s/notes.txt", b"mine")
    assert world.on("two").stage("s", {"a": 1}).done(["x", "gone"])
    if cut:
        world.cut_off("one", {"a": 2}, MANIFEST, x=b"new")
        assert "gone" in world.there()
        world.on("one").pull("s")
    else:
        made(world.on("one").stage("s", {"a": 2}), x=b"new")
    assert world.there().keys() == {"x", MANIFEST, "notes.txt"}
    two = world.on("two")
    assert two.stage("s", {"a": 2}).done(["x"])
    assert not (two.root / "s" / "gone").exists()


@pytest.mark.parametrize("machine", ["one", "two"], ids=["its own machine", "another machine"])
def test_a_folder_deleted_there_is_made_anew(world: World, machine: str):
    made(world.on("one").stage("s", {}), x=b"1", deep=b"2")
    made(world.on("one").stage("other", {}), x=b"1")
    world.on("two").pull("s")
    world.on("two").pull("other")
    shutil.rmtree(world.bucket / "s")
    space = world.on(machine)
    assert not space.stage("s", {}).done()
    assert space.stage("s", {}).missing(["x"]) == ["x"]
    assert space.stage("other", {}).done(["x"])
    with pytest.raises(RayboothError, match="holds no complete s"):
        space.manifest("s")
    made(space.stage("s", {}), x=b"3")
    assert world.there()["x"] == b"3"


def test_a_run_deleted_there_is_no_run(world: World):
    space = world.on("one")
    (space.root / "config.json").write_text("{}")
    space.push("config.json")
    saved(world.uri, [10, 20])
    assert kept_config(world.uri)
    shutil.rmtree(world.bucket)
    assert kept_config(world.uri) is None
    assert Checkpoints(world.on("one"), KEY, 2).newest() == (None, [])


def test_what_never_came_there_is_not_lost_when_its_folder_is_deleted(world: World):
    """Neither a push that was cut off nor work in progress."""
    made(world.on("one").stage("s", {"a": 1}), x=b"old")
    world.cut_off("one", {"a": 2}, "y", x=b"new", y=b"new")
    shutil.rmtree(world.bucket / "s")
    assert world.on("one").stage("s", {"a": 2}).done(["x", "y"])
    assert world.there().keys() == {"x", "y", MANIFEST}
    with pytest.MonkeyPatch.context() as dying:
        dying.setattr(Remote, "put", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.on("one").stage("s", {"a": 3}).write("z", b"newer")
    shutil.rmtree(world.bucket / "s")
    assert world.on("one").stage("s", {"a": 3}).missing(["x", "z"]) == ["x"]


def test_what_another_process_deletes_shows_in_a_store_that_remembers_its_listings(world: World, monkeypatch: pytest.MonkeyPatch):
    from fsspec.implementations.local import LocalFileSystem

    find = LocalFileSystem.find
    remembered: dict[str, object] = {}

    def cached(fs: LocalFileSystem, path: str, **how: object) -> object:
        return remembered.setdefault(path, find(fs, path, **how))

    monkeypatch.setattr(LocalFileSystem, "find", cached)
    monkeypatch.setattr(LocalFileSystem, "invalidate_cache", lambda fs, path=None: remembered.clear())
    made(world.on("one").stage("s", {}), x=b"1")
    assert world.on("one").stage("s", {}).done()
    (world.bucket / "s" / MANIFEST).unlink()
    assert not world.on("one").stage("s", {}).done()


def test_a_slash_at_the_end_makes_no_other_storage(world: World):
    space = world.on("one")
    assert Workspace(f"{world.uri}/").root == space.root
    with pytest.raises(RayboothError, match="in use"), space.locked(), Workspace(f"{world.uri}/").locked():
        pass


def test_the_memory_of_another_process_holds_nothing(tmp_path: Path):
    script = """
import json, sys
from raybooth.workspace import Workspace
space = Workspace("memory://b/run")
stage = space.stage("s", {})
print(json.dumps([stage.done(["x"]), stage.missing(["x", "y"])]))
stage.write("x", b"1"), stage.finish()
assert Workspace("memory://b/run/").stage("s", {}).done(["x"])
assert Workspace(space.uri).stage("s", {}).done(["x"]), "as a worker of this machine opens it"
space.stage("s", {"a": 2}).write("y", b"2")
(space.root / "config.json").write_text("{}")
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [False, ["x", "y"]]
    assert len(list((tmp_path / "raybooth").iterdir())) == 1
