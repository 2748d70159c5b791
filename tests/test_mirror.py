"""A storage behind a URI: written through, read back elsewhere, and what may lie there besides."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from test_workspace import made

from raybooth.errors import RayboothError
from raybooth.manifest import MANIFEST
from raybooth.remote import Remote
from raybooth.workspace import Workspace


def test_a_remote_storage_that_stops_taking_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fsspec

    space = Workspace(f"memory://bucket{tmp_path.name}/full")
    assert space.remote
    space.check_writable()
    assert not fsspec.filesystem("memory").find(f"/bucket{tmp_path.name}/full")

    def full(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(space.remote._fs, "put_file", full)
    with pytest.raises(RayboothError, match=r"full cannot be written to \(NotImplementedError\)"):
        space.stage("s", {}).write("x", b"1")


def test_a_remote_storage_is_written_through_and_read_back_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fsspec

    uri = f"memory://bucket{tmp_path.name}/run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    stage = Workspace(uri).stage("s", {"a": 1})
    stage.write("x", b"1")
    stage.write("deep/y", b"2")
    fs = fsspec.filesystem("memory")
    assert len([f for f in fs.find(f"/bucket{tmp_path.name}/run/s") if ".partial-" in f]) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))  # another machine goes on
    again = Workspace(uri).stage("s", {"a": 1})
    assert again.missing(["x", "deep/y", "z"]) == ["z"]
    again.write("z", b"3")
    again.finish()
    names = {f.split("/s/")[1] for f in fs.find(f"/bucket{tmp_path.name}/run/s")}
    assert names == {"x", "deep/y", "z", MANIFEST}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    third = Workspace(uri)
    assert third.stage("s", {"a": 1}).done(["x", "deep/y", "z"])
    assert json.loads((third.root / "s" / MANIFEST).read_text())["inputs"] == {"a": 1}


def test_what_an_earlier_run_has_left_in_a_remote_storage_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = f"memory://bucket{tmp_path.name}/run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    for inputs, name in ((1, "adapters"), (2, "weights")):
        stage = Workspace(uri).stage("s", {"a": inputs})
        stage.write(name, b"1")
        stage.finish(only=[name])
    for machine in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        there = Workspace(uri)
        there.pull("s")
        assert {p.name for p in (there.root / "s").iterdir()} == {"weights", MANIFEST}


@pytest.mark.parametrize("cut", ["put", "replace"])
@pytest.mark.parametrize("reader", [False, True])
def test_a_push_that_was_cut_off_is_completed_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str, reader: bool):
    """After the stage's files have moved in, or while they do; a later stage, which only reads, completes it too."""
    uri = f"memory://bucket{tmp_path.name}/{cut}{reader}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    made(Workspace(uri).stage("s", {"a": 1}), x=b"old", y=b"old")
    stage = Workspace(uri).stage("s", {"a": 2})
    stage.write("x", b"new")
    stage.write("y", b"new")
    with pytest.MonkeyPatch.context() as dying:
        of, what = (Remote, "put") if cut == "put" else (os, "replace")
        whole = getattr(of, what)

        def dies(*args) -> None:
            if any(str(a).endswith("s/y") for a in args):
                raise KeyboardInterrupt
            whole(*args)

        dying.setattr(of, what, dies)
        with pytest.raises(KeyboardInterrupt):
            stage.finish()
    if reader:
        assert Workspace(uri).manifest("s")["inputs"] == {"a": 2}
    else:
        assert Workspace(uri).stage("s", {"a": 2}).done(["x", "y"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    other = Workspace(uri)
    assert other.stage("s", {"a": 2}).done(["x", "y"])
    assert {p.name for p in (other.root / "s").iterdir()} == {"x", "y", MANIFEST}


def test_a_push_that_was_cut_off_does_not_undo_what_another_machine_has_pushed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = f"memory://bucket{tmp_path.name}/run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    stage = Workspace(uri).stage("s", {"a": 1})
    stage.write("x", b"1")
    with pytest.MonkeyPatch.context() as dying:
        dying.setattr(Remote, "put", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage.finish()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    made(Workspace(uri).stage("s", {"a": 2}), x=b"2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    assert Workspace(uri).stage("s", {"a": 2}).done(["x"])


def test_workers_that_start_together_bring_each_file_once_and_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fsspec.implementations.memory import MemoryFileSystem

    uri = f"memory://bucket{tmp_path.name}/run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    made(Workspace(uri).stage("s", {}), x=b"x" * 1000, y=b"y")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    came, get, cat = [], MemoryFileSystem.get_file, MemoryFileSystem.cat_file

    def slow(self, name: str, file: str) -> None:
        came.append(name[-1])
        time.sleep(0.1)
        get(self, name, file)

    def small(self, name: str) -> bytes:
        assert name.endswith(MANIFEST)
        return cat(self, name)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", small)
    with ThreadPoolExecutor(3) as workers:
        list(workers.map(lambda _: Workspace(uri).pull("s"), range(3)))
    assert sorted(came) == ["x", "y"]
    assert Workspace(uri).stage("s", {}).done(["x", "y"])


def test_what_does_not_fit_on_this_machine_is_said_of_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fsspec.implementations.memory import MemoryFileSystem

    uri = f"memory://bucket{tmp_path.name}/run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    made(Workspace(uri).stage("s", {}), x=b"1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    monkeypatch.setattr(MemoryFileSystem, "get_file", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(RayboothError, match=f"{tmp_path}/two.* is full: free some space"):
        Workspace(uri).pull("s")
    assert [p.name for p in (Workspace(uri).root / "s").iterdir()] == []


def test_a_store_that_does_not_answer_has_deleted_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fsspec's exists() says no of everything then."""
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.spec import AbstractFileSystem

    space = Workspace(f"file://{tmp_path}/bucket")
    stage = space.stage("s", {})
    stage.write("x", b"1")
    stage.finish()

    def down(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(LocalFileSystem, "info", down)
    monkeypatch.setattr(LocalFileSystem, "exists", AbstractFileSystem.exists)
    assert space.remote
    with pytest.raises(RayboothError, match="no answer"):
        space.pull("s")
    with pytest.raises(RayboothError, match="no answer"):
        space.folders("s")
    assert (space.root / "s" / "x").read_bytes() == b"1"


def test_what_is_there_already_is_not_uploaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    space = Workspace(f"file://{tmp_path}/bucket")
    for name in ("x", "y"):
        stage = space.stage("s", {})
        stage.write(name, name.encode())
        stage.finish()
    put, names = Remote.put, list[str]()

    def noted(self: Remote, name: str, file: Path) -> None:
        names.append(name)
        put(self, name, file)

    monkeypatch.setattr(Remote, "put", noted)
    (tmp_path / "bucket" / "s" / "y").unlink()  # somebody's hand
    stage = space.stage("s", {})
    stage.write("z", b"z")
    stage.finish()
    assert [n for n in names if ".partial-" not in n and ".unpushed" not in n] == ["s/y", "s/z", f"s/{MANIFEST}"]
    assert {n: (tmp_path / "bucket" / "s" / n).read_text() for n in "xyz"} == {n: n for n in "xyz"}
