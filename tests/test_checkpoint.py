"""Checkpoints: complete or passed over, whoever was killed while writing."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event
from unittest.mock import Mock

import pytest
import torch

from raybooth.checkpoint import Checkpoints
from raybooth.errors import RayboothError
from raybooth.mirror import PUSHED
from raybooth.remote import Remote
from raybooth.train import State
from raybooth.workspace import Workspace

KEY, OTHER = "a" * 64, "b" * 64


def state(step: int) -> State:
    return State(step, {"weights.x": torch.full((1000,), float(step)), "seen": torch.zeros(4)}, {"read_at": step, "groups": [], "numbers": {}, "scaler": {}})


def saved(storage: str, steps: list[int], keep: int = 2, key: str = KEY) -> Checkpoints:
    checkpoints = Checkpoints(Workspace(storage), key, keep)
    for step in steps:
        checkpoints.save(state(step))
    checkpoints.wait()
    return checkpoints


def test_the_newest_few_are_kept_and_the_newest_is_read(tmp_path: Path):
    found, notes = saved(str(tmp_path), [10, 20, 30]).newest()
    assert found is not None
    assert (found.step, found.scalars["read_at"], notes) == (30, 30, [])
    assert float(found.tensors["weights.x"][0]) == 30
    assert sorted(p.name[-2:] for p in (tmp_path / "checkpoints").iterdir()) == ["20", "30"]


@pytest.mark.parametrize("harm", ["cut", "no manifest", "flipped"])
def test_a_torn_one_is_passed_over_with_a_sentence(tmp_path: Path, harm: str):
    checkpoints = saved(str(tmp_path), [10, 20])
    newest = max((tmp_path / "checkpoints").iterdir())
    data = newest / "state.safetensors"
    if harm == "cut":
        data.write_bytes(data.read_bytes()[:-100])
    elif harm == "flipped":
        data.write_bytes(data.read_bytes()[:-1] + b"\x07")
    else:
        (newest / "manifest.json").unlink()
    found, notes = checkpoints.newest()
    assert found is not None
    assert found.step == 10
    assert len(notes) == 1
    assert newest.name in notes[0]


def test_another_configurations_are_passed_over_and_left_alone(tmp_path: Path):
    saved(str(tmp_path), [50], key=OTHER)
    found, notes = saved(str(tmp_path), [10, 20, 30], keep=1).newest()
    assert found is not None
    assert found.step == 30
    assert "another configuration" in notes[0]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_what_was_being_written_is_no_checkpoint(tmp_path: Path):
    checkpoints = saved(str(tmp_path), [10])
    (tmp_path / "checkpoints" / f".partial-{KEY[:16]}-0000020").mkdir()
    found, notes = checkpoints.newest()
    assert found is not None
    assert (found.step, notes) == (10, [])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda m: json.dumps(m | {"step": None}), "has no manifest"), (lambda m: json.dumps(m | {"step": "2"}), "has no manifest"),
        (lambda m: json.dumps(m | {"scalars": {}}), "lacks something"), (lambda m: "[" * 100_000, "has no manifest"),
    ],
)  # fmt: skip
def test_manifests_that_something_has_damaged_are_passed_over(tmp_path: Path, spoil: Callable[[dict], str], told: str):
    made = saved(str(tmp_path), [1, 2])
    path = max((tmp_path / "checkpoints").iterdir()) / "manifest.json"
    path.write_text(spoil(json.loads(path.read_text())))
    found, notes = made.newest()
    assert found is not None
    assert found.step == 1
    assert told in notes[0]


def test_a_full_disk_is_said_and_costs_no_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import safetensors.torch

    checkpoints = saved(str(tmp_path), [10, 20])

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    (tmp_path / "checkpoints" / f".partial-{OTHER[:16]}-0000010").mkdir()  # of another configuration, left by a kill
    checkpoints.save(state(30))
    with pytest.raises(RayboothError, match="full"):
        checkpoints.wait()
    assert [p.name for p in (tmp_path / "checkpoints").glob(".partial-*")] == [f".partial-{OTHER[:16]}-0000010"]
    found, notes = saved(str(tmp_path), []).newest()
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))
    assert found is not None
    assert (found.step, notes) == (20, [])


def test_a_state_is_copied_when_the_one_before_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two copies at once may be more than the machine has memory for."""
    done: list[str] = []

    class Watched(dict[str, torch.Tensor]):
        def items(self):  # type: ignore[override]
            done.append("copied")
            return super().items()

    def slow(self: Checkpoints, *_: object) -> None:
        time.sleep(0.2)
        done.append("written")

    monkeypatch.setattr(Checkpoints, "_write", slow)
    checkpoints = Checkpoints(Workspace(str(tmp_path)), KEY, 2)
    for step in (10, 20):
        checkpoints.save(replace(state(step), tensors=Watched(state(step).tensors)))
    checkpoints.wait()
    assert done == ["copied", "written"] * 2


def test_they_live_in_a_remote_storage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    saved("memory://checkpoints-test", [10, 20, 30])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))  # another machine
    found, _ = Checkpoints(Workspace("memory://checkpoints-test"), KEY, 2).newest()
    assert found is not None
    assert found.step == 30


def test_what_a_stop_kept_from_the_remote_storage_goes_there_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    uri, bucket, put = f"file://{tmp_path}/bucket", tmp_path / "bucket" / "checkpoints", Remote.put

    def cut_off(remote: Remote, name: str, file: Path) -> None:
        if name.endswith("30/manifest.json"):
            raise RayboothError("the network has gone")
        put(remote, name, file)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "put", cut_off)
        with pytest.raises(RayboothError, match="the network has gone"):
            saved(uri, [10, 20, 30])
    again = Checkpoints(Workspace(uri), KEY, 2)
    found, _ = again.newest()
    assert found is not None
    assert found.step == 30
    again.upload_what_is_left()
    again.wait()
    assert sorted(p.parent.name[-2:] for p in bucket.rglob("manifest.json")) == ["20", "30"]


class SlowRemote:
    """Uploads of the first checkpoint wait for `go`. What was done there, in order: the steps that were put and removed, of one by its manifest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.go, self.done = Event(), list[str]()
        put, remove = Remote.put, Remote.remove

        def slow(remote: Remote, name: str, file: Path) -> None:
            if "0000010" in name:
                self.go.wait(20)
            put(remote, name, file)
            self.done += [f"put {name.split('/')[1][-2:]}"] if name.endswith("manifest.json") else []

        def noted(remote: Remote, name: str) -> None:
            remove(remote, name)
            self.done.append(f"remove {name[-2:]}")

        monkeypatch.setattr(Remote, "put", slow)
        monkeypatch.setattr(Remote, "remove", noted)


def test_a_slow_remote_storage_stops_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those that are kept wait, the newest goes first, and at the end all are there that are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    remote, uri = SlowRemote(monkeypatch), f"file://{tmp_path}/bucket"
    checkpoints = Checkpoints(Workspace(uri), KEY, 2)
    for step in (10, 20, 30, 40):
        checkpoints.save(state(step))
        assert checkpoints.writing
        checkpoints.writing.result()
        assert not remote.done
    here = {p.name[-2:] for p in checkpoints.folder.iterdir()}
    assert here == {"10", "30", "40"}  # 10 is on its way
    remote.go.set()
    checkpoints.wait()
    assert remote.done == ["put 10", "put 40", "put 30", "remove 10"]
    for folder in (checkpoints.folder, tmp_path / "bucket" / "checkpoints"):
        assert {p.name[-2:] for p in folder.iterdir()} == {"30", "40"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    found, notes = Checkpoints(Workspace(uri), KEY, 2).newest()
    assert found is not None
    assert (found.step, notes) == (40, [])


def test_an_upload_that_fails_ends_the_run_at_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    checkpoints = Checkpoints(Workspace(f"file://{tmp_path}/bucket"), KEY, 2)
    monkeypatch.setattr(Remote, "put", Mock(side_effect=RayboothError("The storage is away.")))
    checkpoints.save(state(10))
    for going_on in (checkpoints.wait, lambda: checkpoints.save(state(20))):
        with pytest.raises(RayboothError, match="is away"):
            going_on()
    found, _ = Checkpoints(checkpoints.workspace, KEY, 2).newest()
    assert found is not None
    assert found.step == 10


def agreed(storages: list[Checkpoints]) -> list[tuple[State | None, list[str]]]:
    """What each worker of a group goes on from: threads, which agree as processes do."""
    given, barrier = [0] * len(storages), Barrier(len(storages))

    def worker(rank: int) -> tuple[State | None, list[str]]:
        def least(value: int) -> int:
            given[rank] = value
            barrier.wait(20)
            found = min(given)
            barrier.wait(20)
            return found

        return storages[rank].newest(least)

    with ThreadPoolExecutor(len(storages)) as group:
        return list(group.map(worker, range(len(storages))))


def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Checkpoints]:
    """Two with a mirror each. The first has written the steps 10, 20 and 30, and was lost while it pushed 30."""
    uri = f"file://{tmp_path}/bucket"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    one = saved(uri, [10, 20], keep=3)
    with pytest.MonkeyPatch.context() as lost:
        lost.setattr(Workspace, "push", Mock(side_effect=ConnectionError))
        one.save(state(30))
        with pytest.raises(ConnectionError):
            one.wait()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    return [one, Checkpoints(Workspace(uri), KEY, 3)]


def test_a_group_goes_on_from_a_step_that_all_its_machines_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (one, notes), (two, _) = agreed(machines(tmp_path, monkeypatch))
    assert one is not None
    assert two is not None
    assert (one.step, two.step) == (20, 20)
    assert torch.equal(one.tensors["weights.x"], two.tensors["weights.x"])
    assert notes == [f"passed over the checkpoint {KEY[:16]}-0000030: not every worker can read it"]


def test_a_group_agrees_until_every_worker_can_read_what_the_others_can(tmp_path: Path):
    """Only the first can read 30, only the second 20, and the third has no 10."""
    group = [saved(str(tmp_path / name), steps, keep=3) for name, steps in (("one", [10, 30]), ("two", [10, 20]), ("three", [5, 30]))]
    assert [found for found, _ in agreed(group)] == [None] * 3
    assert [found and found.step for found, _ in agreed(group[:2])] == [10, 10]
    assert [found and found.step for found, _ in agreed([group[0], group[2]])] == [30, 30]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that come from a remote storage, by their checkpoints' steps."""
    names, get = [], Remote.get

    def noted(self: Remote, name: str, file: Path) -> None:
        if name.endswith("state.safetensors"):
            names.append(name.split("/")[1][-2:])
        get(self, name, file)

    monkeypatch.setattr(Remote, "get", noted)
    return names


def test_of_a_remote_storage_only_what_is_gone_on_from_comes_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]):
    uri = f"file://{tmp_path}/bucket"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    one = saved(uri, [10, 20, 30])
    saved(uri, [50], key=OTHER)
    one.newest()
    assert asked == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    for _ in range(2):
        found, notes = Checkpoints(Workspace(uri), KEY, 2, {}).newest()
        assert found is not None
        assert (found.step, len(notes)) == (30, 1)
    assert asked == ["30"]
    two = saved(uri, [40])
    assert list(two.complete()[0]) == [30, 40]
    assert {p.name[-2:] for p in (tmp_path / "bucket" / "checkpoints").glob(f"{KEY[:16]}-*")} == {"30", "40"}  # 20 goes, which never was here


def test_what_is_chosen_from_is_whole(tmp_path: Path):
    kept = saved(str(tmp_path), [10, 20, 30])
    torn = tmp_path / kept.complete()[0][20] / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    found, notes = kept.complete()
    assert list(found) == [30]
    assert notes == [f"passed over the checkpoint {torn.parent.name}: its file is not what its manifest says, it is torn or damaged"]


@pytest.mark.parametrize("harm", ["no manifest", "torn manifest", "cut", "newer tensors"])
def test_a_torn_remote_copy_is_passed_over_and_leaves_the_good_one_here_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str):
    uri = f"file://{tmp_path}/bucket"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    one = saved(uri, [10, 20])
    there = max((tmp_path / "bucket" / "checkpoints").iterdir())
    if harm == "no manifest":
        (there / "manifest.json").unlink()
        (one.workspace.root / PUSHED / "checkpoints" / there.name).unlink()  # it never was there: the push was cut off
    elif harm == "torn manifest":
        (there / "manifest.json").write_text("{")
    elif harm == "newer tensors":
        (there / "manifest.json").write_text((there / "manifest.json").read_text().replace('"bytes": ', '"bytes": 1'))
    (there / "state.safetensors").write_bytes((there / "state.safetensors").read_bytes()[:-100])
    found, notes = one.newest()
    assert found is not None
    assert (found.step, notes) == (20, [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    found, notes = Checkpoints(Workspace(uri), KEY, 2).newest()
    assert found is not None
    assert found.step == 10
    assert notes == [f"passed over the checkpoint {there.name}: it has no manifest, it was cut off while it was written"]
