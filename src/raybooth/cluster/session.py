"""Ray, started once for all stages or joined, and the resources that it has."""

import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from raybooth.cluster import allocator
from raybooth.errors import RayboothError

# Measured on two cores: these save about 15 s of a run. Those that are set already stay as they are.
LEAN = {
    "RAY_USAGE_STATS_ENABLED": "0",  # telemetry
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # the trainer's poll; 2 s by default
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would go into the logging of this process, where the controller runs
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's core warns about every actor that has arguments
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",  # by default 1 s: processes that keep imports for the next stage must outlive a fine-tuning
    "RAY_ENABLE_AUTO_CONNECT": "0",  # after Ctrl-C Ray's threads, still at work, would start a second Ray
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # ours count pictures, Ray's count blocks
}


LOOPBACK = "127.0.0.1"  # where a Ray of this machine alone listens


PATIENCE = 30.0
"""Seconds until a message says that Ray has no place for some work: Ray itself waits and says nothing."""


@dataclass(frozen=True)
class Resources:
    """What Ray has; `here` if it was started on this machine alone. `machines`: CPUs and GPUs of each."""

    cpus: int
    gpus: int
    nodes: int
    here: bool = True
    machines: tuple[tuple[int, int], ...] = ()


def of_this_machine() -> Resources:
    """The CPUs that Ray would have if started here, without GPUs; it counts those that a container is given."""
    from ray._private.utils import get_num_cpus

    return Resources(max(1, int(get_num_cpus(override_docker_cpu_warning=True))), 0, 1)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for what is started meanwhile, and not for what this process starts later."""
    before = {key: os.environ[key] for key in values if key in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for key in values.keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)


def import_quickly() -> None:
    """Collect garbage less often. Call it first in a process: of the time that torch, diffusers and transformers take to import, a fifth is collection."""
    gc.set_threshold(20_000)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Resources]:
    """Ray for the length of a run: joined at `address`, started on this machine, or as it already runs.

    Raises:
        RayboothError: if no cluster answers at `address`.
    """
    for key, value in LEAN.items():
        os.environ.setdefault(key, value)
    # Ray reads it once, on import. This is its own default for what it starts, set so that it does not warn about it.
    if address is None and "ray" not in sys.modules and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        _have_a_token()
    import ray

    ours = not ray.is_initialized()
    if ours:
        _start(address)
    try:
        have = ray.cluster_resources()
        # Ray also lists nodes that are gone, and heads that do no work.
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        head = nodes[0]["NodeManagerAddress"] if len(nodes) == 1 else ""
        machines = tuple((int(n["Resources"]["CPU"]), int(n["Resources"].get("GPU", 0))) for n in nodes)
        yield Resources(max(1, int(have.get("CPU", 1))), int(have.get("GPU", 0)), max(1, len(nodes)), head == LOOPBACK, machines)
    finally:
        if ours:
            _wait_for_ray_data()
            ray.shutdown()


def _wait_for_ray_data() -> None:
    """Wait for Ray Data's threads. After Ctrl-C it gives its loop two seconds to end, and a loop that calls a Ray that is gone ends the process silently."""
    for thread in threading.enumerate():
        if thread.name.startswith(("StreamingExecutor", "ray-data")):
            thread.join(timeout=10)


def _start(address: str | None) -> None:
    import ray

    # When a group cannot start, the trainer's controller, in this process, logs a traceback besides the error that it raises.
    for name, level in {"ray": logging.ERROR, "ray.data": logging.ERROR, "ray.train": logging.CRITICAL}.items():
        logging.getLogger(name).setLevel(level)
    _refuse_silence(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    stopped = signal.getsignal(signal.SIGTERM)
    try:
        with _native_stderr_silent(), _sigterm_is_ours():
            if address:
                ray.init(address=address, **quiet)
            else:
                _start_here(include_dashboard=False, _node_ip_address=LOOPBACK, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise _no_cluster(address, error) from None
    # A Ray that keeps its handlers elsewhere has put one in the place of ours.
    if callable(stopped) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stopped)


@contextlib.contextmanager
def _sigterm_is_ours() -> Iterator[None]:
    """Keep Ray and its core from handling SIGTERM in this process: theirs end it without a word, or with a dump of its stack."""
    from ray._private import ray_constants, utils

    with contextlib.ExitStack() as kept:
        for module, name, value in (
            (utils, "set_sigterm_handler", lambda handler: None), (ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", True),
        ):  # fmt: skip
            if hasattr(module, name):
                kept.enter_context(mock.patch.object(module, name, value))
        yield


def _start_here(**how: Any) -> None:
    """Start Ray on this machine. On a very busy one it may not be up within the half minute that it has: then once more.

    Raises:
        RuntimeError: if that does not help.
    """
    import ray

    with _environment(allocator.environment()), _lean_head():
        for last in (False, True):
            try:
                ray.init(address="local", **how)
                return
            except Exception as error:
                if type(error) is not Exception:  # for that Ray raises a plain Exception
                    raise
                ray.shutdown()
                if last:
                    raise RuntimeError(f"{error} If the machine is busy, try again later") from None


@contextlib.contextmanager
def _lean_head() -> Iterator[None]:
    """Keep Ray's head from starting the processes that scale clusters, carry what workers print, and show a dashboard.

    Ray starts them unasked. On two cores that takes two and a half seconds, and one more at the end; during the steps they wake a hundred times a second.
    """
    from ray._private.node import Node

    with contextlib.ExitStack() as kept:
        for name in ("start_monitor", "start_log_monitor", "start_api_server"):
            if hasattr(Node, name):  # in a Ray that names them otherwise, they start
                kept.callback(setattr, Node, name, getattr(Node, name))
                setattr(Node, name, lambda *_, **__: None)
        yield


def _have_a_token() -> None:
    """Give this run a token of its own where Ray cannot write one into the home folder."""
    folder = Path(os.path.expanduser("~")) / ".ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        closed = not ((folder / "auth_token").exists() or os.access(folder, os.W_OK))
    except OSError:
        closed = True
    if closed and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _refuse_silence(address: str | None) -> None:
    """Refuse an address where nothing listens: Ray itself would wait for minutes."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: Exception) -> RayboothError:
    if address is None:
        return RayboothError(f"Ray cannot be started on this machine: {error}")
    if type(error).__name__ == "AuthenticationError":
        return RayboothError(
            f"The Ray cluster at cluster.address = '{address}' asks for its token: copy ~/.ray/auth_token from a machine of the cluster to this one, "
            "or put what is in it into the environment variable RAY_AUTH_TOKEN. For a cluster without tokens set RAY_AUTH_MODE=disabled."
        )
    return RayboothError(f"No Ray cluster answers at cluster.address = '{address}' ({error}): start one with 'ray start --head', or leave the address out.")


@contextlib.contextmanager
def _native_stderr_silent() -> Iterator[None]:
    """Silence the lines that Ray's core writes to the file descriptor; errors still arrive as exceptions."""
    try:
        saved = os.dup(2)
    except OSError:  # a process without one
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise the RayboothError of a worker as itself, however deeply Ray has wrapped it."""
    try:
        yield
    except RayboothError:
        raise
    except Exception as error:
        ours = next((e for e in causes(error) if isinstance(e, RayboothError)), None)
        if ours is None:
            raise
        raise ours from None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that Ray has wrapped in it."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = [getattr(one, name, None) for name in ("__cause__", "__context__", "cause", "health_check_failure", "controller_failure")]
        inner += list((getattr(one, "worker_failures", None) or {}).values())
        waiting += [e for e in inner if isinstance(e, BaseException)]


def no_place(wanted: str) -> str:
    """A sentence that says what waits for a place, and what the cluster has."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    there = " and ".join(f"{have.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU") if kind == "CPU" or have.get(kind))
    return f"Ray has no place for {wanted} yet: the cluster has {there}; they start when there is one"


def last_line(error: BaseException | str) -> str:
    """The last line of an error's text, which says what is wrong, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1][:300].rstrip(".") + "."


def check_workers(workers: int, gpus_per_worker: float | None, have: Resources) -> float:
    """The number of GPUs that each worker gets.

    Raises:
        RayboothError: if there are not enough GPUs or CPUs for that many workers.
    """
    each = gpus_per_worker if gpus_per_worker is not None else float(have.gpus > 0)
    if workers * each > have.gpus:
        raise RayboothError(
            f"cluster.workers = {workers} with cluster.gpus_per_worker = {each:g} needs {workers * each:g} GPUs and there are {have.gpus}: "
            "ask for fewer workers, or set cluster.gpus_per_worker = 0 to run on CPUs."
        )
    places = sum(min(cpus, int(gpus / each)) for cpus, gpus in have.machines) if each else have.cpus
    if each and have.machines and workers > places:
        raise RayboothError(
            f"cluster.workers = {workers} with cluster.gpus_per_worker = {each:g} needs a CPU and {each:g} GPU{'s' * (each > 1)} on one machine for each, and "
            f"the machines there are have room for {places}: ask for fewer workers, or for fewer GPUs each."
        )
    if not each and workers > have.cpus:
        raise RayboothError(f"cluster.workers = {workers} needs as many CPUs and there are {have.cpus}: ask for fewer workers.")
    return each
