"""The readings of a fine-tuning: rates, what a run that goes on drops, trackers that fail."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from raybooth import log
from raybooth.errors import RayboothError
from raybooth.remote import Remote
from raybooth.workspace import Workspace


def said_nothing(word: log.Row) -> None:
    raise AssertionError(word)


def test_what_was_said_before_the_first_checkpoint_is_said_once(tmp_path: Path):
    """TensorBoard drops what a run had said of steps that come again when it meets a mark."""
    for _ in range(2):
        with log.Log(Workspace(str(tmp_path)), "key", ["tensorboard"], 0, [], 1, 1, said_nothing) as made:
            made.write(1, {"loss": 1.0})
            made.write(2, {"loss": 1.0})
    files = sorted((tmp_path / "tensorboard").rglob("events*"), key=lambda p: p.stat().st_mtime_ns)
    assert [next(iter(marks(file))) for file in files] == [1] * len(files)


def marks(file: Path) -> Iterator[int]:
    """Steps of the marks that a writer begins with."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    data = file.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            yield event.step
        data = data[16 + length :]


def test_rates_are_per_second_since_the_last_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 104.0, 105.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    made = log.Log(Workspace(str(tmp_path)), "key", [], 0, [], images=8, flops=1000, say=said_nothing)
    first, second, third = (made.write(step, {"loss": 1.0}) for step in (10, 20, 30))
    assert first["images_per_second"] is None
    assert (second["images_per_second"], second["flops_per_second"]) == (20.0, 2500.0)
    assert (third["images_per_second"], third["flops_per_second"]) == (80.0, 10000.0)
    assert made.rate() == 4.0


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    first = log.Log(workspace, "key", [], 0, [], 1, 1, said_nothing)
    for step in (10, 20, 30):
        first.write(step, {})
    log.Log(workspace, "key", [], 20, first.rows[:2], 1, 1, said_nothing).write(30, {"again": True})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [10, 20, 30]
    assert rows[-1]["again"]


def test_a_tracker_that_does_not_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def away(workspace: Workspace, run: str, start: int) -> log.Tracker:
        raise ConnectionError("nobody is there")

    monkeypatch.setitem(log.TRACKERS, "wandb", away)
    with pytest.raises(RayboothError, match=r"'wandb', which does not start.*nobody is there"):
        log.Log(Workspace(str(tmp_path)), "key", ["wandb"], 0, [], 1, 1, said_nothing)


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Said once; others get their readings, and are closed."""
    said: list[str] = []
    away, there = Mock(side_effect=ConnectionError("nobody is there")), Mock()
    monkeypatch.setitem(log.TRACKERS, "mlflow", lambda *_: (away, away))
    monkeypatch.setitem(log.TRACKERS, "wandb", lambda *_: (there.log, there.close))
    with log.Log(Workspace(str(tmp_path)), "key", ["mlflow", "wandb"], 0, [], 1, 1, lambda word: said.append(word["note"])) as made:
        for step in (1, 2):
            made.write(step, {"loss": 1.0})
    assert said == ["readings do not arrive at mlflow; all are in metrics.jsonl: nobody is there"]
    assert (there.log.call_count, there.close.call_args.args) == (2, (True,))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    return Workspace(f"file://{tmp_path}/bucket")


def test_readings_go_to_a_remote_storage_beside_the_steps(bucket: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All but those that newer ones have overtaken; TensorBoard's with them."""
    slow, pushed, put = threading.Event(), list[str](), Remote.put

    def held_up(self: Remote, name: str, file: Path) -> None:
        pushed.append(name)
        slow.wait(20)
        put(self, name, file)

    monkeypatch.setattr(Remote, "put", held_up)
    with log.Log(bucket, "key", ["tensorboard"], 0, [], 1, 1, said_nothing) as made:
        for step in range(1, 6):
            made.write(step, {"loss": 1.0})
        assert not (tmp_path / "bucket").exists()
        slow.set()
    assert pushed.count("metrics.jsonl") in (1, 2)
    assert len((tmp_path / "bucket" / "metrics.jsonl").read_text().splitlines()) == 5
    event_file = next((bucket.root / "tensorboard").rglob("events*"))
    assert event_file.read_bytes() == (tmp_path / "bucket" / event_file.relative_to(bucket.root)).read_bytes()


def test_readings_are_in_the_remote_storage_however_a_run_ends(bucket: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ended: list[bool] = []
    monkeypatch.setitem(log.TRACKERS, "wandb", lambda *_: (lambda step, numbers: None, ended.append))
    made = log.Log(bucket, "key", ["tensorboard", "wandb"], 0, [], 1, 1, said_nothing)
    made.write(1, {"loss": 1.0})
    with pytest.raises(ZeroDivisionError), made:
        raise ZeroDivisionError
    assert ended == [False]
    assert len((tmp_path / "bucket" / "metrics.jsonl").read_text().splitlines()) == 1
    assert list((tmp_path / "bucket" / "tensorboard").rglob("events*"))


def test_readings_that_do_not_arrive_are_said_once_and_tried_again(bucket: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    with log.Log(bucket, "key", [], 0, [], 1, 1, lambda word: said.append(word["note"])) as made:
        with monkeypatch.context() as away:
            away.setattr(Remote, "put", Mock(side_effect=RayboothError("The storage is away.")))
            for step in (1, 2, 3):
                made.write(step, {"loss": 1.0})
                assert made.pusher
                made.pusher.wait()
        made.write(4, {"loss": 1.0})
    assert said == ["readings do not arrive in the storage, and stay on this machine until they do: The storage is away."]
    assert len((tmp_path / "bucket" / "metrics.jsonl").read_text().splitlines()) == 4


def test_the_peak_of_a_process_is_its_own():
    """Not that of the process which started it, as getrusage has it on Linux."""
    import subprocess
    import sys

    held = bytearray(600 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    code = "import sys; sys.modules['torch'] = type('t', (), {'cuda': type('c', (), {'is_available': staticmethod(lambda: False)})}); " \
           "from raybooth.log import peak_memory; print(peak_memory())"  # fmt: skip
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < 300 << 20
