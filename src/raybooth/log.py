"""The readings of a fine-tuning: `metrics.jsonl` in the storage, and the trackers that people watch."""

import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from raybooth.background import Background
from raybooth.errors import RayboothError
from raybooth.extras import missing
from raybooth.files import files_under, write_atomically
from raybooth.manifest import digest
from raybooth.workspace import Workspace

Row = dict[str, Any]
Tracker = tuple[Callable[[int, Row], None], Callable[[bool], None]]
"""A function that takes (step, numbers by name), and one that ends the tracking, told whether the run went well."""


class Log:
    """The readings of one worker; only the first worker's are written. A context manager: whatever ends the run, trackers are told, and the storage has all.

    A checkpoint holds the readings before it, and a run continues with those of its checkpoint: the file may be another machine's, or
    hold another configuration's. They go to a remote storage in the background, and a run does not end if some do not arrive.

    Args:
        key: the configuration's, as checkpoints have it: each has records of its own with the trackers.
        trackers: names of `TRACKERS`; None for a log that does not write.
        start: the step that the run continues from.
        rows: the readings up to there.
        images, flops: rows and floating-point operations of a step, over all workers.
        say: takes a note for people.
    """

    def __init__(
        self, workspace: Workspace, key: str, trackers: Sequence[str] | None, start: int, rows: Sequence[Row], images: int, flops: int,
        say: Callable[[Row], None],
    ):  # fmt: skip
        self.workspace, self.images, self.flops, self.path = workspace, images, flops, workspace.root / "metrics.jsonl"
        self.rows: list[Row] = [*rows]
        self.writes = trackers is not None
        self.trackers = {name: _started(name, workspace, digest([workspace.uri, key])[:16], start) for name in trackers or ()}
        self.times: list[tuple[int, float]] = []
        self.say, self.trouble, self.told = say, "", set[str]()
        self.pushed: dict[str, int] = {}
        self.pusher = Background(self._push, "readings") if self.writes and workspace.remote else None

    def write(self, step: int, metrics: Row) -> Row:
        """Note a reading; returns it with images and FLOPs a second (since the last one) and the process's peak memory in bytes."""
        self.times.append((step, time.monotonic()))
        rate = _steps_per_second(self.times[-2:])
        rates = {"images_per_second": rate and self.images * rate, "flops_per_second": rate and self.flops * rate}
        row = {"step": step, **metrics, **rates, "peak_memory": peak_memory()}
        self.rows.append(row)
        if self.writes:
            write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in self.rows).encode())
            numbers = {k: v for k, v in row.items() if k != "step" and v is not None}
            for name, (log, _) in self.trackers.items():
                with self._spared(name):
                    log(step, numbers)
        if self.pusher:
            self.pusher.ask()
            self._tell()
        return row

    def _push(self) -> None:
        """Push the files that have grown since they were last pushed."""
        try:
            for name in (self.path.name, *(f"tensorboard/{file}" for file in files_under(self.workspace.root / "tensorboard"))):
                size = (self.workspace.root / name).stat().st_size
                if self.pushed.get(name) != size:
                    self.workspace.push(name)
                    self.pushed[name] = size
        except Exception as error:  # whatever the store says: the run is worth more than its readings
            self.trouble = str(error)

    @contextlib.contextmanager
    def _spared(self, tracker: str) -> Iterator[None]:
        """Report what goes wrong with a tracker, and let the run go on."""
        try:
            yield
        except Exception as error:  # whatever its package raises
            self._note(tracker, f"readings do not arrive at {tracker}; all are in {self.path.name}: {error}")

    def _tell(self) -> None:
        if self.trouble:
            self._note("storage", f"readings do not arrive in the storage, and stay on this machine until they do: {self.trouble}")

    def _note(self, of: str, text: str) -> None:
        """Say `text` once for each `of`: the same is tried again with every reading."""
        if of not in self.told:
            self.told.add(of)
            self.say({"note": text})

    def rate(self) -> float | None:
        """Steps per second since the first reading: what comes before it is warming up."""
        return _steps_per_second(self.times)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for name, (_, close) in self.trackers.items():
            with self._spared(name):
                close(kind is None)
        if self.pusher:
            self.pusher.ask()
            self.pusher.wait()
            self._tell()


def _steps_per_second(times: Sequence[tuple[int, float]]) -> float | None:
    """The rate over readings (step, s); None before the second."""
    if len(times) < 2:
        return None
    (first, began), (last, now) = times[0], times[-1]
    return (last - first) / (now - began)


def peak_memory() -> int:
    """Peak memory in bytes, of the GPU if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux; getrusage's peak would count what the process that started this one held
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _started(name: str, workspace: Workspace, run: str, start: int) -> Tracker:
    try:
        return TRACKERS[name](workspace, run, start)
    except RayboothError:
        raise
    except Exception as error:  # whatever its package raises, if a service is not there, say
        raise RayboothError(
            f"finetune.trackers names '{name}', which does not start ({error}): set it up as its documentation says, or leave it out."
        ) from error


def _tensorboard(workspace: Workspace, run: str, start: int) -> Tracker:
    from tensorboardX import SummaryWriter

    # At the beginning too: a run that was stopped before its first checkpoint logs the same once more.
    writer = SummaryWriter(str(workspace.root / "tensorboard" / run), purge_step=start + 1)

    def log(step: int, numbers: Row) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, lambda well: writer.close()


def _wandb(workspace: Workspace, run: str, start: int) -> Tracker:
    """A tracker of Weights & Biases, which drops steps that it has already: they are the same once more."""
    wandb = _installed("wandb")
    going = wandb.init(project="raybooth", name=workspace.storage, id=run, resume="allow")
    return lambda step, numbers: going.log(numbers, step=step), lambda well: going.finish(exit_code=0 if well else 1)


def _mlflow(workspace: Workspace, run: str, start: int) -> Tracker:
    """A tracker of MLflow, which names its runs itself: ours is found by a tag."""
    mlflow = _installed("mlflow")
    mlflow.set_experiment("raybooth")
    found = mlflow.search_runs(filter_string=f"tags.raybooth = '{run}'", output_format="list") if start else []  # the newest first
    mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=workspace.storage, tags={"raybooth": run})
    return lambda step, numbers: mlflow.log_metrics(numbers, step=step), lambda well: mlflow.end_run("FINISHED" if well else "FAILED")


def _installed(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise missing("finetune.trackers", name) from None


TRACKERS: dict[str, Callable[[Workspace, str, int], Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
