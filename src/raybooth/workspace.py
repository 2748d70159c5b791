"""Where a run's things lie: stage folders with manifests, atomic writes, a lock.

A stage folder holds a stage's complete outputs and `manifest.json`, which names each with its sha256. Work in progress
lies in `.partial-<digest of inputs>` beside them and moves in only when it is complete, so that what a stage made
before survives until then. Files that no manifest names are the user's and are never touched.
"""

import contextlib
import getpass
import hashlib
import os
import re
import shlex
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from raybooth.clock import Worked
from raybooth.disk import cache_folder, explained, is_locked, lock, path_of
from raybooth.errors import RayboothError
from raybooth.files import files_under, sweep, write_atomically
from raybooth.manifest import digest, holds_configuration, move_in, read_manifest
from raybooth.mirror import Mirror
from raybooth.remote import Remote
from raybooth.stage import Stage, intact

LOCK = ".lock"
"""A storage's lock file, held while a run is at work there. It names the holder, and its time is when that began."""


def _check_address(storage: str) -> None:
    """Refuse a mistyped address, which would make a folder of that name.

    Raises:
        RayboothError: if it is neither a path nor the address of a place.
    """
    scheme, is_address, place = storage.partition("://")
    one_slash = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", storage)
    if one_slash or (is_address and (not scheme or not place.strip("/") or (scheme.lower() == "file" and not place.startswith("/")))):
        raise RayboothError(f"The storage {storage} is neither a folder nor an address: write a path, or an address such as s3://bucket/run.")
    if is_address and ":" in re.split(r"[/?#]", place, maxsplit=1)[0].rpartition("@")[0]:
        raise RayboothError(
            f"The storage {scheme}://***@{place.partition('@')[2]} has a password in its address, which would be noted with the run: leave it out, "
            "and give it as the environment variable or file that this kind of storage reads."
        )


class Workspace:
    """One storage. A URI is mirrored in a folder of this machine: read from there, written through. A folder is made when it is first written to.

    Raises:
        RayboothError: if `storage` cannot be one.
    """

    def __init__(self, storage: str):
        _check_address(storage)
        self.storage = storage
        self.worked = Worked()
        self.remote = Remote(storage) if "://" in storage else None
        if self.remote:  # with or without a slash at the end it is the same place
            self.root = cache_folder() / digest(storage.rstrip("/"))[:16]
        else:
            self.root = path_of(storage, "storage").absolute()
        self.mirror = Mirror(self.remote, self.root) if self.remote else None
        if self.remote:
            if self.remote.is_memory:
                self._forget_other_processes()
            self._check_writable_here()

    def _forget_other_processes(self) -> None:
        """Drop what an earlier process has left in the mirror of its memory.

        Raises:
            RayboothError: if that one is still running.
        """
        with _OPENING:
            if self.root in _OF_THIS_PROCESS:
                return
            with self.locked():
                for path in self.root.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name != LOCK:
                        path.unlink()
            _OF_THIS_PROCESS.add(self.root)

    @property
    def uri(self) -> str:
        """The storage as a worker in another folder can open it: an absolute path, or the URI; for this process's memory its mirror."""
        return self.storage if self.remote and not self.remote.is_memory else str(self.root)

    def stage(self, name: str, inputs: dict[str, Any]) -> Stage:
        return Stage(self, name, inputs)

    def command(self, verb: str) -> str:
        """The command of a verb on this storage, for messages. Given no more than that, each goes by the storage's own settings."""
        quoted = shlex.quote(self.storage)
        said = f"raybooth {verb} --storage {quoted}"
        return said if quoted.startswith("'") else f"'{said}'"

    def first(self, verb: str) -> str:
        """The advice, for messages, to run `verb` first, if what it makes is not there yet, or not as it is needed."""
        return f"run {self.command(verb)} first{self._or_all()}"

    def _anew(self, stage: str) -> str:
        return f"run {self.command(_VERBS.get(stage, stage))} to make it again{self._or_all()}"

    def _or_all(self) -> str:
        """The advice to use `run` instead, if that would do: in a storage that holds a run, and not a LoRA that was made elsewhere."""
        imported = "imported" in (read_manifest(self.root / "fine-tuned-model") or {}).get("inputs", {})
        return f", or {self.command('run')} for all" if holds_configuration(self.root) and not imported else ""

    def manifest(self, stage: str) -> dict[str, Any]:
        """The manifest of a stage that must have been run before.

        Raises:
            RayboothError: if it has not.
        """
        self.pull(stage)
        manifest = read_manifest(self.root / stage)
        if manifest is None:
            raise RayboothError(f"The storage {self.storage} holds no complete {stage}: {self.first(_VERBS.get(stage, stage))}.")
        return manifest

    def output(self, stage: str, name: str) -> Path:
        """The path of an output that the stage's manifest names.

        Raises:
            RayboothError: if it is no longer there.
        """
        path = self.root / stage / name
        if not path.is_file():
            what, first = ("is no file", "move it elsewhere and ") if path.exists() else ("is missing", "")
            raise RayboothError(f"{stage}/{name} {what} in the storage {self.storage}, though the manifest of {stage} names it: {first}{self._anew(stage)}.")
        return path

    def intact(self, stage: str, names: Iterable[str]) -> bool:
        """Whether a stage has made these outputs, from whatever inputs, and they are there as it made them."""
        self.pull(stage)
        manifest = read_manifest(self.root / stage) or {"outputs": {}}
        return all(name in manifest["outputs"] and intact(self.root / stage / name, manifest["outputs"][name]) for name in names)

    def check_intact(self, stage: str) -> None:
        """Refuse a stage with an output that is missing, or not as it was made.

        Raises:
            RayboothError: if there is one, or the stage was not run.
        """
        for name, described in self.manifest(stage)["outputs"].items():
            if not intact(self.output(stage, name), described):
                raise self._changed(stage, name)

    def _changed(self, stage: str, name: str) -> RayboothError:
        return RayboothError(f"{stage}/{name} in the storage {self.storage} is not what its manifest says, it was changed or damaged: {self._anew(stage)}.")

    def read(self, stage: str, name: str, sha256: str) -> bytes:
        """The content of an output, which has the digest `sha256`.

        Raises:
            RayboothError: if it is no longer there, or differs.
        """
        data = self.output(stage, name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise self._changed(stage, name)
        return data

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Hold the storage against other runs of this machine, or of all that share the mount. What killed runs left half written there is removed.

        Raises:
            RayboothError: if another holds it, naming that one, or if it cannot be written to.
        """
        path = self.root / LOCK
        self._check_writable_here()
        if path.exists() and not (path.is_file() or path.is_dir()):  # a folder explains itself when it is opened
            raise RayboothError(f"{path} is no file, and in the way of one of raybooth's: move it elsewhere, and run the same command again.")
        with explained(self.storage, self.root), path.open("a+", errors="replace") as f:
            try:
                locks = lock(f, wait=False)
            except BlockingIOError:
                f.seek(0)
                holder = f.read().strip() or "another run"
                raise RayboothError(f"The storage {self.storage} is in use by {holder}: wait for it, stop it, or give another --storage.") from None
            if not locks:  # refusing would shut out whoever has no other mount; few make the mistake of starting a second run
                say(f"The storage {self.storage} lies on a file system without locks: start no second run in it before this one has ended.")
            f.seek(0)
            if (text := f.read()) and not _HOLDER.fullmatch(text):
                raise RayboothError(
                    f"{LOCK} in the storage {self.storage} is none of raybooth's, which would write into it: move it, or give another --storage."
                )
            f.truncate(0)
            f.write(f"{_user()}@{socket.gethostname()}, process {os.getpid()}")
            f.flush()
            sweep(self.root)
            yield

    def check_writable(self) -> None:
        """Check that the storage can be written to.

        Raises:
            RayboothError: if it cannot.
        """
        self._check_writable_here()
        if self.remote:
            self.remote.check_writable()

    def _check_writable_here(self) -> None:
        with explained(self.storage, self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".writable-{uuid.uuid4().hex}"  # workers open it at the same moment
            write_atomically(probe, b"")
            probe.unlink()

    def pull(self, stage: str) -> None:
        """Bring what the remote storage, if there is one, holds of a stage and this machine does not."""
        if self.mirror:
            self.mirror.pull(stage)

    def take_in(self, stage: str, partial: Path) -> None:
        """Make a stage's complete work in progress its outputs, in the remote storage too."""
        if self.mirror:
            self.mirror.take_in(stage, partial)
        else:
            move_in(partial)

    def folders(self, folder: str) -> set[str]:
        """Names of the folders in `folder`, here or in the remote storage, except hidden ones."""
        found = self.mirror.folders(folder) if self.mirror else {p.name for p in (self.root / folder).glob("*") if p.is_dir()}
        return {name for name in found if not name.startswith(".")}

    def push(self, name: str) -> None:
        """Copy one file to the remote storage, if there is one."""
        if self.mirror:
            self.mirror.push(name)

    def remove(self, name: str) -> None:
        """Remove a folder from the remote storage, if there is one."""
        if self.remote:
            self.remote.remove(name)

    def push_tree(self, name: str) -> None:
        """Copy a folder's files to the remote storage, if there is one."""
        for file in files_under(self.root / name) if self.remote else ():
            self.push(f"{name}/{file}")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Link or copy a stage's output into another storage. Outputs are replaced, never written into: a link will do where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def process_at_work(root: Path) -> int | None:
    """The id of this machine's process that is at work in the storage of folder `root`; None if there is none."""
    if not is_locked(root / LOCK):
        return None
    try:
        found = _HOLDER.fullmatch((root / LOCK).read_text())
    except FileNotFoundError:
        return None
    return int(found[2]) if found and found[1] == socket.gethostname() else None


def _user() -> str:
    """The name of this process's user; a container's may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


_HOLDER = re.compile(r".*@(.*), process (\d+)", re.DOTALL)
"""What a lock file holds: user, machine and process."""
_OF_THIS_PROCESS: set[Path] = set()
"""Mirrors of this process's memory."""
_OPENING = threading.Lock()

_VERBS = {
    "base-model": "prepare", "instance-images": "prepare", "latents": "encode",
    "fine-tuned-model": "finetune", "output-images": "generate", "scores": "evaluate",
}  # fmt: skip
"""The verb that makes a stage, where its name is different."""
