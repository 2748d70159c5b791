"""Checkpoints of a fine-tuning: written and uploaded in the background, used only if complete, the newest few kept."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.background import Background
from raybooth.disk import explained_if_full
from raybooth.files import write_atomically
from raybooth.manifest import MANIFEST, describe, read_manifest
from raybooth.workspace import Workspace

if TYPE_CHECKING:
    from raybooth.train import State

FOLDER = "checkpoints"
TENSORS = "state.safetensors"
PARTIAL = ".partial-"


class Checkpoints:
    """The checkpoints of one configuration in a storage. `key` is the configuration's digest; those of others are left alone.

    A checkpoint is a folder `<key>-<step>` with its tensors and, written last, a manifest that names their digest. It is written here first; if
    the storage is remote, those that are kept are then uploaded, the newest first: if the network is too slow for all, some are never sent.

    Args:
        recipe: how the weights were trained, kept in the manifest for whoever opens them.
    """

    def __init__(self, workspace: Workspace, key: str, keep: int, recipe: dict[str, Any] | None = None):
        self.workspace, self.key, self.keep, self.recipe = workspace, key, keep, recipe or {}
        self.folder = workspace.root / FOLDER
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        self.uploader = Background(self._upload, "upload") if workspace.remote else None
        self.lock = threading.Lock()  # guards the next three
        self.written = self.uploading = ""
        self.to_upload: list[str] = []  # oldest first

    def newest(self, least: Callable[[int], int] = lambda step: step) -> "tuple[State | None, list[str]]":
        """The newest complete checkpoint that all workers of the group can read, and a sentence for everything that was passed over.

        Machines may hold different ones, if one was lost while it was written or pushed; workers that continued from
        different steps would average gradients of different weights, and wait for each other at the end.

        Args:
            least: returns the least of the values that the workers pass to it; all of them call it equally often.
        """
        # Cut off while they were written. This configuration's are written anew, and a worker that briefly outlives its driver may still be writing one.
        for partial in self.folder.glob(f"{PARTIAL}*"):
            if not partial.name.startswith(f"{PARTIAL}{self.key[:16]}-"):
                shutil.rmtree(partial, ignore_errors=True)
        most: int | None = None
        while True:
            state, notes = self._newest(most)
            step = state.step if state else 0
            most = least(step)
            if least(int(step == most)):
                return state, notes

    def upload_what_is_left(self) -> None:
        """Upload the newest checkpoints that were written here but, because of a stop, did not reach the remote storage."""
        if self.uploader is None or self.workspace.remote is None:
            return
        there = {name.partition("/")[0] for name in self.workspace.remote.names(FOLDER) if name.endswith(f"/{MANIFEST}")}
        here = self._of_this(path.name for path in self.folder.glob("*"))
        with self.lock:
            self.to_upload = [name for name in reversed(here[: self.keep]) if name not in there and _whole(self.folder / name, self.key)[0]]
            left = bool(self.to_upload)
        if left:
            self.uploader.ask()

    def _newest(self, most: int | None) -> "tuple[State | None, list[str]]":
        """The newest complete checkpoint that this machine can read, up to step `most` if other workers have no newer one, and the sentences of newest()."""
        notes, own = [], self._own()
        others = sorted(self.workspace.folders(FOLDER) - set(own))
        if others:
            notes.append(f"passed over {len(others)} checkpoints of another configuration ({others[-1]}); delete them if you will not go back to it")
        for name in own:
            if most is not None and name > self._name(most):
                notes.append(f"passed over the checkpoint {name}: not every worker can read it")
                continue
            self.workspace.pull(f"{FOLDER}/{name}")
            state, problem = _read(self.folder / name, self.key)
            if state:
                return state, notes
            notes.append(f"passed over the checkpoint {name}: {problem}")
        return None, notes

    def complete(self) -> "tuple[dict[int, str], list[str]]":
        """The folder in the storage of each complete checkpoint, by step, oldest first, and a sentence for everything that was passed over."""
        found, notes = {}, []
        for name in reversed(self._own()):
            self.workspace.pull(f"{FOLDER}/{name}")
            manifest, problem = _whole(self.folder / name, self.key)
            if manifest:
                found[manifest["step"]] = f"{FOLDER}/{name}"
            else:
                notes.append(f"passed over the checkpoint {name}: {problem}")
        return found, notes

    def save(self, state: "State") -> None:
        """Copy `state`, write it while the steps go on, and upload it; waits until the one before is written (one copy is enough).

        Raises:
            RayboothError: if something went wrong with an earlier one.
        """
        if self.writing:
            self.writing.result()
        if self.uploader:
            self.uploader.check()
        tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.tensors.items()}
        self.writing = self.writer.submit(self._write, state.step, tensors, state.scalars)

    def wait(self) -> None:
        """Wait until all checkpoints that are kept are in the storage."""
        if self.writing:
            self.writing.result()
        if self.uploader:
            self.uploader.wait()

    def _write(self, step: int, tensors: dict[str, Any], scalars: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        name = self._name(step)
        partial, target = self.folder / f"{PARTIAL}{name}", self.folder / name
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with explained_if_full(f"The storage {self.workspace.storage}"):
                save_file(tensors, partial / TENSORS)
                _sync(partial / TENSORS)
                outputs = {TENSORS: describe(partial / TENSORS)}
                manifest = {"stage": FOLDER, "digest": self.key, "step": step, "scalars": scalars, "recipe": self.recipe, "outputs": outputs}
                write_atomically(partial / MANIFEST, json.dumps(manifest).encode())
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # gigabytes, perhaps on a full disk
            raise
        shutil.rmtree(target, ignore_errors=True)  # a torn one of that step
        os.replace(partial, target)
        _sync(self.folder)
        with self.lock:
            self.written, self.to_upload = name, [*self.to_upload, name]
            self._forget_here()
        if self.uploader:
            self.uploader.ask()

    def _forget_here(self) -> None:
        """Delete local checkpoints that are too old since the last one was written, except one that is being uploaded."""
        for old in self._old((path.name for path in self.folder.iterdir()), self.written):
            if old != self.uploading:
                shutil.rmtree(self.folder / old, ignore_errors=True)
        self.to_upload = [name for name in self.to_upload if (self.folder / name).exists()]

    def _upload(self) -> None:
        """Upload all that are waiting, the newest first; older ones are removed from the remote storage once newer ones are complete there."""
        newest, remote = "", self.workspace.remote
        assert remote is not None
        while True:
            with self.lock:
                self.uploading = self.to_upload.pop() if self.to_upload else ""
                self._forget_here()
            if not self.uploading:
                return
            for file in (TENSORS, MANIFEST):
                self.workspace.push(f"{FOLDER}/{self.uploading}/{file}")
            newest = max(newest, self.uploading)
            for old in self._old({name.partition("/")[0] for name in remote.names(FOLDER)}, newest):
                self.workspace.remove(f"{FOLDER}/{old}")

    def _old(self, names: Iterable[str], name: str) -> list[str]:
        """The folders among `names` that go once `name` is complete: this configuration's up to it but the newest few. Newer ones are another's, or torn."""
        return [own for own in self._of_this(names) if own <= name][self.keep :]

    def _name(self, step: int) -> str:
        return f"{self.key[:16]}-{step:07d}"

    def _own(self) -> list[str]:
        """Names of this configuration's checkpoints, here and in the remote storage, the newest first."""
        return self._of_this(self.workspace.folders(FOLDER))

    def _of_this(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are of this configuration, the newest first."""
        return sorted((name for name in names if name.startswith(f"{self.key[:16]}-")), reverse=True)


def _whole(path: Path, key: str) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a checkpoint that can be read, or else None and what is wrong with it."""
    manifest = read_manifest(path)
    if manifest is None:
        return None, "it has no manifest, it was cut off while it was written"
    if manifest["digest"] != key:
        return None, "it belongs to another configuration"
    try:
        if describe(path / TENSORS) != manifest["outputs"][TENSORS]:
            return None, "its file is not what its manifest says, it is torn or damaged"
    except (OSError, KeyError) as error:
        return None, f"it cannot be read ({error})"
    return manifest, ""


def _read(path: Path, key: str) -> "tuple[State | None, str]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from raybooth.train import State

    manifest, problem = _whole(path, key)
    if manifest is None:
        return None, problem
    if not {"read_at", "groups", "numbers", "scaler"} <= manifest["scalars"].keys():
        return None, "its manifest lacks something"
    try:
        return State(manifest["step"], load_file(path / TENSORS), manifest["scalars"]), ""
    except (OSError, SafetensorError, KeyError) as error:
        return None, f"it cannot be read ({error})"


def _sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
