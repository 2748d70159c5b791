"""The seconds that a manifest tells: all that a stage took, also before a stop, and none of another's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stored import on_mini

from raybooth.files import write_atomically
from raybooth.manifest import MANIFEST
from raybooth.stage import Stage
from raybooth.verbs import do
from raybooth.workspace import Workspace


def made(stage: Stage, **files: bytes) -> None:
    for name, data in files.items():
        stage.write(name, data)
    stage.finish()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that goes on by so many seconds when it is told to."""
    time = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    return lambda seconds: time.__setitem__(0, time[0] + seconds)


def seconds_in(folder: Path) -> float:
    return json.loads((folder / MANIFEST).read_text())["seconds"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_stage_that_was_cut_off_counts_from_its_beginning_on_another_machine_too(
    remote: bool, tmp_path: Path, now: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
):
    storage = f"memory://{tmp_path.name}/run" if remote else str(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    first = Workspace(storage).stage("s", {"a": 1})
    now(60)
    first.write("x", b"1")
    now(1)  # what follows the last note is lost
    if remote:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    space = Workspace(storage)
    stage = space.stage("s", {"a": 1})
    now(7)
    made(stage, y=b"2")
    assert seconds_in(space.root / "s") == 67
    assert sorted(p.name for p in (space.root / "s").iterdir() if p.name[0] != ".") == [MANIFEST, "x", "y"]


def test_more_of_the_same_adds_its_time_and_less_or_nothing_takes_none_away(tmp_path: Path, now: Callable[[float], None]):
    space = Workspace(str(tmp_path))
    for seconds, files in ((10, {"x": b"1"}), (3, {"y": b"2"}), (0, {})):
        stage = space.stage("s", {"a": 1})
        now(seconds)
        made(stage, **files)
    assert seconds_in(tmp_path / "s") == 13
    for inputs in ({"a": 1}, {"a": 2}):  # made anew as a whole: the time before is that of what is gone
        stage = space.stage("s", inputs)
        stage.clear()
        now(5)
        made(stage, x=b"3", y=b"4")
        assert seconds_in(tmp_path / "s") == 5


def test_time_that_one_stage_takes_within_another_counts_once(tmp_path: Path, now: Callable[[float], None]):
    space = Workspace(str(tmp_path))
    outer = space.stage("outer", {})
    now(100)
    inner = space.stage("inner", {})
    now(20)
    made(inner, x=b"1")
    now(4)
    made(outer, x=b"1")
    assert (seconds_in(tmp_path / "outer"), seconds_in(tmp_path / "inner")) == (104, 20)


def test_results_that_are_made_as_a_whole_keep_the_time_of_what_was_cut_off(tmp_path: Path, now: Callable[[float], None]):
    for seconds in (30, 12):
        stage = Workspace(str(tmp_path)).stage("s", {})
        stage.clear()
        now(seconds)
        stage.keep_time()
    stage.write("x", b"1")
    stage.finish()
    assert seconds_in(tmp_path / "s") == 42


def test_a_fine_tuning_that_was_cut_off_counts_from_its_beginning(
    tmp_path: Path, photos: Path, now: Callable[[float], None], in_process: None, monkeypatch: pytest.MonkeyPatch
):
    def cut_off(*_: Any, heard: Callable[[dict[str, Any]], None], **__: Any) -> None:
        now(60)
        heard({"start": 0})
        raise KeyboardInterrupt

    def complete(*_: Any, **__: Any) -> dict[str, Any]:
        now(5)
        [partial] = (tmp_path / "fine-tuned-model").glob(".partial-*")
        write_atomically(partial / "weights", b"1")
        return {"history": []}

    with on_mini(tmp_path, photos, "prior.images=0") as run:
        do(run, ["prepare", "encode"])
        monkeypatch.setattr("raybooth.cluster.fit.run_group", cut_off)
        with pytest.raises(KeyboardInterrupt):
            do(run, ["finetune"])
        monkeypatch.setattr("raybooth.cluster.fit.run_group", complete)
        do(run, ["finetune"])
        assert list(run.outputs("fine-tuned-model")) == ["weights"]
    assert seconds_in(tmp_path / "fine-tuned-model") == 65
