"""Where a run's things lie: stage folders with manifests, atomic writes, a lock.

A stage folder holds a stage's complete outputs and `manifest.json`, which names each with its sha256. Work in progress
lies in `.partial-<digest of inputs>` beside them and moves in only when it is complete, so that what a stage made
before survives until then. Files that no manifest names are the user's and are never touched.
"""

import contextlib
import getpass
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from raybooth.clock import CLOCK, Clock, Worked
from raybooth.disk import explained, lock, path_of
from raybooth.errors import RayboothError
from raybooth.manifest import (
    BLOCK,
    MANIFEST,
    describe,
    digest,
    file_digest,
    files_under,
    is_another,
    move_in,
    read_manifest,
    write_atomically,
)
from raybooth.mirror import Mirror
from raybooth.remote import Remote


class Stage:
    """One stage's folder. `inputs` says from what the outputs follow; its digest decides whether they still hold."""

    def __init__(self, workspace: "Workspace", name: str, inputs: dict[str, Any]):
        self.workspace, self.name, self.inputs = workspace, name, inputs
        self.folder = workspace.root / name
        self.key = digest(inputs)
        self.partial = self.folder / f".partial-{self.key[:16]}"
        workspace.pull(name)
        self._clock = Clock(workspace.worked, self.partial / CLOCK)
        self._complete_interrupted_finish()

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Of what is complete, whatever its inputs were."""
        return read_manifest(self.folder)

    @property
    def held(self) -> dict[str, Any] | None:
        """The manifest, if the complete outputs follow from these inputs."""
        manifest = self.manifest
        return manifest if manifest is not None and manifest["digest"] == self.key else None

    def done(self, names: Iterable[str] | None = None) -> bool:
        """Whether every one of `names` (default: all outputs) is there and intact."""
        held = self.held
        if held is None:
            return False
        outputs = held["outputs"]
        return all(n in outputs and _intact(self.folder / n, outputs[n]) for n in (outputs if names is None else names))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are neither complete and intact nor among the work in progress."""
        held = self.held
        outputs = held["outputs"] if held else {}
        return [
            n for n in names if not (self.partial / n).exists() and not (n in outputs and _intact(self.folder / n, outputs[n]))
        ]  # fmt: skip

    def path(self, name: str) -> Path:
        """Where output `name` lies now."""
        return self.partial / name if (self.partial / name).exists() else self.folder / name

    def clear(self) -> None:
        """Drop the work in progress, for results that are made as a whole; not the time that it took."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._clock.before:
            self._clock.keep()

    def write(self, name: str, data: bytes) -> None:
        """Add one output to the work in progress."""
        write_atomically(self.partial / name, data)
        self.workspace.push(f"{self.name}/{self.partial.name}/{name}")
        self.keep_time()

    def keep_time(self) -> None:
        """Note, now and then, the time that was worked on this: what is cut off and gone on with counts from its beginning."""
        if self._clock.due:
            with contextlib.suppress(OSError, RayboothError):  # a full disk stops what has more to write
                self._clock.keep()
                self.workspace.push(f"{self.name}/{self.partial.name}/{CLOCK}")

    def finish(self, facts: dict[str, Any] | None = None, only: Iterable[str] | None = None, earlier: float = 0.0) -> dict[str, Any]:
        """Move the work in progress into place: beside what holds already, instead of what does not.

        `only` names the outputs that are still wanted; without it all that hold are kept. `earlier` are seconds of work that others were made by.
        """
        old = self.manifest
        self.partial.mkdir(parents=True, exist_ok=True)
        new = {n: describe(self.partial / n) for n in files_under(self.partial) if n != MANIFEST}
        kept = dict(old["outputs"]) if old and old["digest"] == self.key else {}
        self._refuse_to_overwrite(new, old)
        outputs = kept | new
        if only is not None:
            outputs = {n: outputs[n] for n in only}
        before = old.get("seconds", 0) if old and kept.keys() - new.keys() & outputs.keys() else 0.0  # what is kept took its time too
        manifest = {
            "stage": self.name,
            "digest": self.key,
            "inputs": self.inputs,
            "facts": facts or {},
            "seconds": round(earlier + before + self._clock.stop(), 1),
            "outputs": dict(sorted(outputs.items())),
        }
        write_atomically(self.partial / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        self.workspace.take_in(self.name, self.partial)
        return manifest

    def _complete_interrupted_finish(self) -> None:
        if (self.partial / MANIFEST).exists():
            self.workspace.take_in(self.name, self.partial)

    def _refuse_to_overwrite(self, new: dict[str, dict[str, Any]], old: dict[str, Any] | None) -> None:
        mirror = self.workspace.mirror  # in which nothing is the user's, but in what it mirrors
        foreign = mirror.foreign(self.name, new) if mirror else self._foreign(new, set(old["outputs"]) if old else set())
        if foreign:
            where = f"{self.workspace.storage.rstrip('/')}/{self.name}" if mirror else self.folder
            what = f"{len(foreign)} files ({foreign[0]}, ...) are" if len(foreign) > 1 else f"{foreign[0]} is"
            raise RayboothError(
                f"In {where} {what} in the way of outputs of the same name, and no manifest says that raybooth made what is there: "
                "move it elsewhere and run the same command again."
            )

    def _foreign(self, new: dict[str, dict[str, Any]], ours: set[str]) -> list[str]:
        """Of files that are there and in no manifest, those with the very content are ours, of a stage that has lost its manifest."""
        there = [n for n in new if n not in ours and (self.folder / n).exists()]
        foreign = [n for n in there if not (self.folder / n).is_file() or describe(self.folder / n) != new[n]]
        folders = {p.as_posix() for n in new for p in Path(n).parents} - ours
        foreign += sorted(f for f in folders if os.path.lexists(self.folder / f) and not (self.folder / f).is_dir())
        manifest = self.folder / MANIFEST
        if manifest.is_dir() or (manifest.is_file() and is_another(manifest.read_bytes())):
            foreign.append(MANIFEST)
        return foreign


def _intact(path: Path, described: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != described["bytes"]:
        return False
    # Hashing gigabytes of weights at every start would cost more than it tells; their size must do.
    return path.stat().st_size > 4 * BLOCK or file_digest(path) == described["sha256"]


def _check_address(storage: str) -> None:
    """A slip in an address would make a folder of its name.

    Raises:
        RayboothError: if it is neither a path nor the address of a place.
    """
    scheme, is_address, place = storage.partition("://")
    one_slash = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", storage)
    if one_slash or (is_address and (not scheme or not place.strip("/") or (scheme.lower() == "file" and not place.startswith("/")))):
        raise RayboothError(f"The storage {storage} is neither a folder nor an address: write a path, or an address such as s3://bucket/run.")


class Workspace:
    """One storage. A URI is mirrored in a folder of this machine: read from there, written through.

    Raises:
        RayboothError: if the storage cannot be written to.
    """

    def __init__(self, storage: str):
        _check_address(storage)
        self.storage = storage
        self.worked = Worked()
        self.remote = Remote(storage) if "://" in storage else None
        if self.remote:  # with or without a slash at its end it is one place
            self.root = path_of(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "raybooth" / digest(storage.rstrip("/"))[:16]
        else:
            self.root = path_of(storage, "storage").absolute()
        self.mirror = Mirror(self.remote, self.root) if self.remote else None
        with explained(storage, self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if self.remote and self.remote.is_memory:
                self._forget_other_processes()
            probe = self.root / f".writable-{uuid.uuid4().hex}"  # workers open it at the same moment
            write_atomically(probe, b"")
            probe.unlink()

    def _forget_other_processes(self) -> None:
        """Drop what an earlier process has left in the mirror of its memory.

        Raises:
            RayboothError: if that one still runs.
        """
        with _OPENING:
            if self.root in _OF_THIS_PROCESS:
                return
            with self.locked():
                for path in self.root.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name != ".lock":
                        path.unlink()
            _OF_THIS_PROCESS.add(self.root)

    @property
    def uri(self) -> str:
        """The storage as a worker in another folder can open it: an absolute path, or the URI; of this process's memory its mirror."""
        return self.storage if self.remote and not self.remote.is_memory else str(self.root)

    def stage(self, name: str, inputs: dict[str, Any]) -> Stage:
        return Stage(self, name, inputs)

    def manifest(self, stage: str) -> dict[str, Any]:
        """Of a stage that must have been run before.

        Raises:
            RayboothError: if it has not.
        """
        self.pull(stage)
        manifest = read_manifest(self.root / stage)
        if manifest is None:
            raise RayboothError(
                f"The storage {self.storage} holds no complete {stage}: run 'raybooth {_VERBS.get(stage, stage)}' first, or 'raybooth run' for all."
            )
        return manifest

    def output(self, stage: str, name: str) -> Path:
        """Where an output lies that the stage's manifest names.

        Raises:
            RayboothError: if it is no longer there.
        """
        path = self.root / stage / name
        if not path.is_file():
            what, first = ("is no file", "move it elsewhere and ") if path.exists() else ("is missing", "")
            raise RayboothError(
                f"{stage}/{name} {what} in the storage {self.storage}, though the manifest of {stage} names it: "
                f"{first}run 'raybooth {_VERBS.get(stage, stage)}' to make it again, or 'raybooth run' for all."
            )
        return path

    def intact(self, stage: str, names: Iterable[str]) -> bool:
        """Whether a stage has made these outputs, whatever from, and they are there as it made them."""
        self.pull(stage)
        manifest = read_manifest(self.root / stage) or {"outputs": {}}
        return all(name in manifest["outputs"] and _intact(self.root / stage / name, manifest["outputs"][name]) for name in names)

    def read(self, stage: str, name: str, sha256: str) -> bytes:
        """An output as its manifest has it.

        Raises:
            RayboothError: if it is no longer there, or another.
        """
        data = self.output(stage, name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RayboothError(
                f"{stage}/{name} in the storage {self.storage} is not what its manifest says, it was changed or damaged: "
                f"run 'raybooth {_VERBS.get(stage, stage)}' to make it again, or 'raybooth run' for all."
            )
        return data

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Hold the storage against other runs of this machine, or of all that share the mount.

        Raises:
            RayboothError: naming the holder.
        """
        path = self.root / ".lock"
        with explained(self.storage, self.root), path.open("a+", errors="replace") as f:
            try:
                locks = lock(f, wait=False)
            except BlockingIOError:
                f.seek(0)
                holder = f.read().strip() or "another run"
                raise RayboothError(f"The storage {self.storage} is in use by {holder}: wait for it, stop it, or give another --storage.") from None
            if not locks:  # to refuse would shut out whoever has no other mount; to start a second run is a mistake that few make
                say(f"The storage {self.storage} lies on a file system without locks: start no second run in it before this one has ended.")
            f.truncate(0)
            f.write(f"{_user()}@{socket.gethostname()}, process {os.getpid()}")
            f.flush()
            yield

    def check_writable(self) -> None:
        """Of a remote storage, for who is going to write: a folder's is known since it was opened."""
        if self.remote:
            self.remote.check_writable()

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
        """Names of the folders in one of the storage, here or in the remote storage, but of hidden ones."""
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
    """A stage's output for another storage. Outputs are replaced and never written into: a link will do where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _user() -> str:
    """Of this process; a container's may have no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


_OF_THIS_PROCESS: set[Path] = set()
"""Mirrors of this process's memory."""
_OPENING = threading.Lock()

_VERBS = {
    "base-model": "prepare", "instance-images": "prepare", "latents": "encode",
    "fine-tuned-model": "finetune", "output-images": "generate", "scores": "evaluate",
}  # fmt: skip
"""What makes a stage, where it is called otherwise."""
