"""Ray's start on this machine, and joining a cluster: fast, quiet, and without what a run does not need."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
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


def prepare_import(address: str | None) -> None:
    """Set the environment that Ray reads when it is imported or started; what is set already stays as it is."""
    for key, value in LEAN.items():
        os.environ.setdefault(key, value)
    # Ray reads it once, on import. This is its own default for what it starts, set so that it does not warn about it.
    if address is None and "ray" not in sys.modules and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        _have_a_token()


def start(address: str | None) -> None:
    """Join the cluster at `address`, or start Ray on this machine alone.

    Raises:
        RayboothError: if no cluster answers there, or Ray cannot be started here.
    """
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
