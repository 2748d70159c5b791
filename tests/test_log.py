"""The readings of a fine-tuning: rates, what a run that goes on drops, trackers that fail."""

import json
from pathlib import Path

import pytest

from raybooth import log
from raybooth.errors import RayboothError
from raybooth.workspace import Workspace


def test_rates_are_per_second_since_the_last_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 104.0, 105.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    made = log.Log(Workspace(str(tmp_path)), "key", [], 0, [], images=8, flops=1000)
    first, second, third = (made.write(step, {"loss": 1.0}) for step in (10, 20, 30))
    assert first["images_per_second"] is None
    assert (second["images_per_second"], second["flops_per_second"]) == (20.0, 2500.0)
    assert (third["images_per_second"], third["flops_per_second"]) == (80.0, 10000.0)
    assert made.rate() == 4.0


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    first = log.Log(workspace, "key", [], 0, [], 1, 1)
    for step in (10, 20, 30):
        first.write(step, {})
    log.Log(workspace, "key", [], 20, first.rows[:2], 1, 1).write(30, {"again": True})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [10, 20, 30]
    assert rows[-1]["again"]


def test_a_tracker_that_does_not_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def away(workspace: Workspace, run: str, start: int) -> log.Tracker:
        raise ConnectionError("nobody is there")

    monkeypatch.setitem(log.TRACKERS, "wandb", away)
    with pytest.raises(RayboothError, match=r"'wandb', which does not start.*nobody is there"):
        log.Log(Workspace(str(tmp_path)), "key", ["wandb"], 0, [], 1, 1)


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
