import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from raybooth.errors import RayboothError
from raybooth.manifest import MANIFEST, write_atomically
from raybooth.remote import Remote
from raybooth.workspace import Workspace


def made(stage, **files: bytes):
    for name, data in files.items():
        stage.write(name, data)
    stage.finish()


def test_a_stage_is_done_by_digest_and_only_while_its_files_are_intact(tmp_path: Path):
    space = Workspace(str(tmp_path))
    made(space.stage("s", {"a": 1}), x=b"1", y=b"2")
    assert space.stage("s", {"a": 1}).done()
    assert not space.stage("s", {"a": 2}).done()
    (tmp_path / "s" / "x").write_bytes(b"!")
    assert space.stage("s", {"a": 1}).missing(["x", "y", "z"]) == ["x", "z"]
    assert not space.stage("s", {"a": 1}).done()


def test_rows_in_progress_count_and_are_not_seen_by_others_until_finished(tmp_path: Path):
    space = Workspace(str(tmp_path))
    stage = space.stage("s", {"a": 1})
    stage.write("x", b"1")
    again = Workspace(str(tmp_path)).stage("s", {"a": 1})
    assert again.missing(["x", "y"]) == ["y"]
    assert not again.done(["x"])
    again.write("y", b"2")
    again.finish()
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [MANIFEST, "x", "y"]


def test_other_inputs_replace_only_when_complete_and_never_touch_the_users_files(tmp_path: Path):
    space = Workspace(str(tmp_path))
    made(space.stage("s", {"a": 1}), x=b"old", gone=b"old")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    new = space.stage("s", {"a": 2})
    new.write("x", b"new")
    assert (tmp_path / "s" / "x").read_bytes() == b"old"
    new.finish()
    assert (tmp_path / "s" / "x").read_bytes() == b"new"
    assert not (tmp_path / "s" / "gone").exists()
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"


def test_a_users_file_in_the_way_is_named_and_kept(tmp_path: Path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x").write_bytes(b"mine")
    stage = Workspace(str(tmp_path)).stage("s", {})
    stage.write("x", b"ours")
    with pytest.raises(RayboothError, match="x is in the way of outputs"):
        stage.finish()
    assert (tmp_path / "s" / "x").read_bytes() == b"mine"


@pytest.mark.parametrize("spoil", [Path.unlink, lambda manifest: manifest.write_text("{")])
def test_a_stage_that_has_lost_its_manifest_takes_back_what_it_made(spoil: Callable[[Path], None], tmp_path: Path):
    space = Workspace(str(tmp_path))
    made(space.stage("s", {"a": 1}), x=b"1", y=b"2")
    spoil(tmp_path / "s" / MANIFEST)
    made(space.stage("s", {"a": 1}), x=b"1", y=b"2")
    assert space.stage("s", {"a": 1}).done(["x", "y"])
    spoil(tmp_path / "s" / MANIFEST)
    with pytest.raises(RayboothError, match=r"2 files \(x, \.\.\.\) are in the way"):
        made(space.stage("s", {"a": 2}), x=b"3", y=b"4")
    assert (tmp_path / "s" / "x").read_bytes() == b"1"


def test_a_finish_that_was_cut_off_is_completed_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    space = Workspace(str(tmp_path))
    made(space.stage("s", {"a": 1}), x=b"old", y=b"old")
    new = space.stage("s", {"a": 2})
    new.write("x", b"new")
    new.write("z", b"new")
    replace, calls = os.replace, []

    def dies(source, target):
        calls.append(target)
        if len(calls) == 3:  # the manifest is written, one file is moved
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        new.finish()
    monkeypatch.undo()
    again = space.stage("s", {"a": 2})
    assert again.done(["x", "z"])
    assert not (tmp_path / "s" / "y").exists()


def test_a_torn_manifest_is_no_manifest(tmp_path: Path):
    space = Workspace(str(tmp_path))
    made(space.stage("s", {"a": 1}), x=b"1")
    path = tmp_path / "s" / MANIFEST
    path.write_text(path.read_text()[:40])
    assert not space.stage("s", {"a": 1}).done()
    with pytest.raises(RayboothError, match="no complete s"):
        space.manifest("s")


def test_an_atomic_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_atomically(tmp_path / "f", b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "f", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def _hold(path: str, ready, done):
    with Workspace(path).locked():
        ready.set()
        done.wait(20)


def test_the_lock_names_its_holder_and_goes_with_the_process(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready, done))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(RayboothError, match=f"process {holder.pid}"), Workspace(str(tmp_path)).locked():
        pass
    holder.kill()
    holder.join()
    with Workspace(str(tmp_path)).locked():
        pass


def test_a_user_without_a_name_holds_the_lock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    with Workspace(str(tmp_path)).locked():
        assert (tmp_path / ".lock").read_text().startswith(f"user {os.getuid()}@")


def test_a_lock_of_somebody_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    space = Workspace(str(tmp_path))
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(RayboothError, match=r"is not writable.*\.lock"), space.locked():
        pass


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
