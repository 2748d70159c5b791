import errno
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from raybooth.config import Config
from raybooth.errors import RayboothError
from raybooth.files import write_atomically
from raybooth.manifest import MANIFEST, read_manifest
from raybooth.session import Run
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


def test_a_link_to_a_disk_that_is_away_is_in_the_way(tmp_path: Path):
    stage = Workspace(str(tmp_path)).stage("s", {})
    stage.write("x", b"ours")
    (tmp_path / "s" / "x").symlink_to("/no/such/disk")
    with pytest.raises(RayboothError, match="x is in the way of outputs"):
        stage.finish()
    assert (tmp_path / "s" / "x").is_symlink()


@pytest.mark.parametrize("spoil", [Path.unlink, lambda manifest: manifest.write_text("{"), lambda manifest: manifest.write_bytes(bytes(100))])
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


@pytest.mark.parametrize("inputs", [{"k": "new"}, {"k": "another"}])
def test_a_finish_that_was_cut_off_between_its_files_is_never_taken_for_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, str]):
    """Neither by who reads what the stage holds, nor by its next start, whatever that is for."""
    workspace = Workspace(str(tmp_path))
    for k in ("old", "new"):
        stage = workspace.stage("model", {"k": k})
        for name in ("a.bin", "b.bin"):
            stage.write(name, k.encode())
        if k == "old":
            stage.finish()
    replace, moved = os.replace, list[Any]()

    def stops(source: Any, target: Any) -> None:
        if Path(target).name == "b.bin" and not moved:
            moved.append(target)
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stops)
        with pytest.raises(KeyboardInterrupt):
            stage.finish()
    with pytest.raises(RayboothError, match="holds no complete model"):
        workspace.manifest("model")
    again = workspace.stage("model", inputs)
    assert again.done() == (inputs == {"k": "new"})
    assert workspace.manifest("model")["inputs"] == {"k": "new"}
    assert [workspace.output("model", name).read_text() for name in ("a.bin", "b.bin")] == ["new", "new"]


@pytest.mark.parametrize("name", ["../mine.txt", "/tmp/mine.txt", "a/../../mine.txt"])
def test_a_manifest_that_names_files_elsewhere_is_none(tmp_path: Path, name: str):
    """Of a storage that was given away, say: what is not wanted any more is deleted."""
    stage = Workspace(str(tmp_path / "run")).stage("things", {"n": 1})
    stage.write("a.txt", b"a")
    manifest = stage.finish()
    assert read_manifest(stage.folder) == manifest
    manifest["outputs"][name] = manifest["outputs"]["a.txt"]
    (stage.folder / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(stage.folder) is None


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
    real = Path.open

    def refused(path: Path, *args: Any, **how: Any) -> Any:
        if path.name == ".lock":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **how)

    space = Workspace(str(tmp_path))
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(RayboothError, match=r"is not writable.*\.lock"), space.locked():
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_is_worked_on_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
    said: list[str] = []
    with Workspace(str(tmp_path)).locked(said.append):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
    assert len(said) == 1
    assert "without locks" in said[0]
    made(Workspace(f"memory://{tmp_path.name}/run").stage("s", {}), x=b"1")  # a mirror's folder may lie there too


def test_a_run_says_that_its_storage_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with Run(Config(subject={"class": "dog"}, storage=str(tmp_path))):  # type: ignore[arg-type]
        pass
    assert capsys.readouterr().err.count("without locks") == 1


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_is_held_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(RayboothError, match="in use by another run"), Workspace(str(tmp_path)).locked():
        pass


@pytest.mark.parametrize(("number", "told"), [(errno.EIO, "input/output error"), (errno.ESTALE, "mount it again")])
def test_a_disk_or_a_mount_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: str):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(RayboothError, match=rf"{told}.*\.lock"), Workspace(str(tmp_path)).locked():
        pass


def test_a_storage_behind_a_link_to_itself_is_said(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RayboothError, match="loop/run lies behind a symbolic link that leads to itself"), Workspace(str(tmp_path / "loop" / "run")).locked():
        pass


def test_a_storage_whose_folder_cannot_be_made_is_said():
    with pytest.raises(RayboothError, match="/proc/raybooth/run cannot be made"), Workspace("/proc/raybooth/run").locked():
        pass


def test_a_storage_on_a_read_only_mount_is_read_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made(Workspace(str(tmp_path)).stage("s", {}), x=b"1")

    def read_only(path: Path, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("os.replace", read_only)
    monkeypatch.setattr(Path, "write_bytes", read_only)
    space = Workspace(str(tmp_path))
    assert space.output("s", "x").read_bytes() == b"1"
    assert space.manifest("s")["outputs"].keys() == {"x"}
    with pytest.raises(RayboothError, match="is on a read-only file system"), space.locked():
        pass


def test_a_storage_is_made_when_it_is_first_written_to(tmp_path: Path):
    space = Workspace(str(tmp_path / "run"))
    with pytest.raises(RayboothError, match="holds no complete s"):
        space.manifest("s")
    assert not (tmp_path / "run").exists()
    with space.locked():
        assert (tmp_path / "run").is_dir()


def test_what_killed_runs_left_half_written_goes_when_it_is_old(tmp_path: Path):
    old = time.time() - 7200
    left = [tmp_path / name for name in ("s/.raybooth-x.png.123.tmp", "s/.partial-1/.raybooth-y.png.9.tmp", ".raybooth-scratch-ab/unet/weights")]
    others = [
        tmp_path / name for name in ("s/x.png", "s/.partial-1/y.png", "s/.seconds.tmp", "s/notes.tmp", "theirs/.scratch-notes/thesis.txt", ".cache.2023.tmp")
    ]
    for path in (*left, *others, tmp_path / "s/.raybooth-new.png.9.tmp", tmp_path / ".raybooth-scratch-new/weights"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        if "new" not in str(path):
            os.utime(path, (old, old))
    for folder in (tmp_path / ".raybooth-scratch-ab/unet", tmp_path / ".raybooth-scratch-ab", tmp_path / ".raybooth-scratch-new"):
        os.utime(folder, (old, old))
    with Workspace(str(tmp_path)).locked():
        assert not [path for path in left if path.exists()]
        assert not (tmp_path / ".raybooth-scratch-ab").exists()
        assert all(path.exists() for path in others)
        assert (tmp_path / "s/.raybooth-new.png.9.tmp").exists()
        assert (tmp_path / ".raybooth-scratch-new/weights").exists()


@pytest.mark.parametrize("theirs", [b'{"name": "my site"}', b"[1, 2]", b"null", b"# not JSON at all"])
def test_a_users_own_manifest_is_in_the_way_too(tmp_path: Path, theirs: bytes):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / MANIFEST).write_bytes(theirs)
    stage = Workspace(str(tmp_path)).stage("s", {})
    stage.write("x", b"ours")
    with pytest.raises(RayboothError, match=r"manifest\.json is in the way of outputs"):
        stage.finish()
    assert (tmp_path / "s" / MANIFEST).read_bytes() == theirs
    (tmp_path / "s" / MANIFEST).unlink()
    stage.finish()
    assert stage.done(["x"])


@pytest.mark.parametrize(
    "held",
    ["[]", "null", '{"digest": "x"', '{"digest": "x", "outputs": []}', '{"digest": "x", "outputs": {}}',
     '{"digest": 5, "outputs": {}, "inputs": {}, "facts": {}}',
     '{"digest": "x", "outputs": {"a": 1}, "inputs": {}, "facts": {}}', '{"digest": "x", "outputs": {"a": {"bytes": 1}}, "inputs": {}, "facts": {}}'],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_none(tmp_path: Path, held: str):
    """A stage with it is not done, and who needs it says so, whoever has had a hand in the file."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / MANIFEST).write_text(held)
    assert read_manifest(tmp_path / "s") is None
    with pytest.raises(RayboothError):
        Workspace(str(tmp_path)).manifest("s")


def test_what_has_changed_since_a_stage_was_made_is_told(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    made(workspace.stage("s", {"seed": 1, "model": "a" * 64, "how": {"lr": 0.1, "steps": 4}}), x=b"x")
    assert workspace.stage("s", {"seed": 1, "model": "a" * 64, "how": {"lr": 0.1, "steps": 4}}).why == ""
    other = workspace.stage("s", {"seed": 1, "model": "b" * 64, "how": {"lr": 0.2, "steps": 4}, "new": None})
    assert other.why == "model changed, how.lr was 0.1 and is 0.2"
    assert workspace.stage("nothing", {"a": 1}).why == ""


def test_where_run_alone_would_not_do_it_is_not_advised(tmp_path: Path):
    assert Workspace(str(tmp_path)).first("encode") == f"run 'raybooth encode --storage {tmp_path}' first"
    blank = tmp_path / "two words"
    config = Config(subject={"class": "dog"}, storage=str(blank))
    with Run(config, quiet=True) as run:
        run.save_config()
    here = f"--storage '{blank}'"
    assert Workspace(str(blank)).first("encode") == f"run raybooth encode {here} first, or raybooth run {here} for all"
    made(Workspace(str(blank)).stage("fine-tuned-model", {"imported": "x"}), x=b"x")
    assert Workspace(str(blank)).first("encode") == f"run raybooth encode {here} first"
