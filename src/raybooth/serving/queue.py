"""Runs one after another, each `raybooth run` in a process and session of its own, with its log in the storage."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from raybooth.disk import is_locked
from raybooth.manifest import CONFIG_FILE
from raybooth.serving.progress import RUN_LOG, State
from raybooth.workspace import LOCK, process_at_work

Command = Callable[[Path], list[str]]
log = logging.getLogger("raybooth.serving")


def command(storage: Path) -> list[str]:
    """What makes and, run again, resumes the run in `storage`."""
    return [sys.executable, "-m", "raybooth", "run", str(storage / CONFIG_FILE), "--storage", str(storage)]


class Queue:
    """Runs, at most `running` at a time and at most `waiting` behind them.

    What it knows dies with the server; what has become of a run is told by its storage and its log.
    A run outlives a server that is killed (its lock tells), and ends with one that is closed.
    A storage may go at any time, with whatever was to be done in it: the others still have their turn.
    """

    def __init__(self, command: Command = command, running: int = 1, waiting: int = 8, grace: float = 20):
        self.command, self.running, self.waiting, self.grace = command, running, waiting, grace
        self._lock = threading.Lock()
        self._waiting: deque[Path] = deque()
        self._live: dict[Path, subprocess.Popen[bytes]] = {}
        self._stopping: set[Path] = set()

    @property
    def full(self) -> bool:
        return len(self._live) >= self.running and len(self._waiting) >= self.waiting

    def put(self, storage: Path) -> bool:
        """Queue the run in `storage`; return whether there was room for it."""
        with self._lock:
            if self.full:
                return False
            if storage not in self._waiting and storage not in self._live:
                (storage / RUN_LOG).write_bytes(b"")
                self._waiting.append(storage)
            self._begin()
        return True

    def state(self, storage: Path) -> State | None:
        if storage in self._live:
            return "running"
        return "queued" if storage in self._waiting else None

    def stop(self, storage: Path) -> None:
        """Stop a run by Ctrl-C, and by SIGKILL if it does not end by that; returns at once."""
        with self._lock:
            with contextlib.suppress(ValueError):
                self._waiting.remove(storage)
            process = self._live.get(storage)
            if process:
                self._stopping.add(storage)
        pid = process.pid if process else process_at_work(storage)
        if pid:
            threading.Thread(target=self._end, args=(pid, lambda: not (process.poll() is None if process else is_locked(storage / LOCK)))).start()

    def close(self) -> None:
        """Stop everything, and wait for it."""
        with self._lock:
            self._waiting.clear()
        for storage in list(self._live):
            self.stop(storage)
        until = time.monotonic() + self.grace + 5
        while self._live and time.monotonic() < until:
            time.sleep(0.05)

    def _begin(self) -> None:
        while self._waiting and len(self._live) < self.running:
            storage = self._waiting.popleft()
            try:
                process = self._started(storage)
            except OSError as error:
                log.warning("the run in %s cannot be started: %s", storage, error)
                continue
            self._live[storage] = process
            threading.Thread(target=self._watch, args=(storage, process), daemon=True).start()

    def _started(self, storage: Path) -> "subprocess.Popen[bytes]":
        with (storage / RUN_LOG).open("wb") as said:
            return subprocess.Popen(
                self.command(storage), stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
                # People wait for pictures: the server's workers do not give way to others, those of a run do.
                env={k: v for k, v in os.environ.items() if k != "RAY_worker_niceness"},
            )  # fmt: skip

    def _watch(self, storage: Path, process: "subprocess.Popen[bytes]") -> None:
        status = process.wait()
        with self._lock:
            with contextlib.suppress(OSError):
                self._note_end(storage, status)
            self._stopping.discard(storage)
            del self._live[storage]
            self._begin()

    def _note_end(self, storage: Path, status: int) -> None:
        with (storage / RUN_LOG).open("a") as said:
            if storage in self._stopping:
                said.write("\nraybooth: stopped.\n")
            elif status < 0:
                said.write(f"\nraybooth: the run was ended by {signal.Signals(-status).name}, perhaps for lack of memory. Resumed, it goes on from there.\n")
        (storage / RUN_LOG).touch()  # its time is when the run ended, whatever it said

    def _end(self, pid: int, gone: Callable[[], bool]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
            until = time.monotonic() + self.grace
            while time.monotonic() < until:
                if gone():
                    return
                time.sleep(0.05)
            os.killpg(pid, signal.SIGKILL)
