"""A remote storage's mirror: a folder of this machine, read there and written through."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from raybooth.disk import lock
from raybooth.files import file_digest, replacing, scratch, write_atomically
from raybooth.manifest import MANIFEST, describe, is_another, move_in, parse_manifest, read_manifest
from raybooth.remote import Remote

UNPUSHED = ".unpushed"
"""A mark in a stage's folder, here and in the remote storage, until all that was made is there: the work in progress that moves in, the manifest that
was there before, and the names of all there that is raybooth's, by which the next push, even another machine's, knows them."""

PUSHED = ".pushed"
"""A folder in the mirror: for each stage that the remote storage was seen to hold, its manifest's digest. What is not there any more was deleted there."""


class Mirror:
    """The mirror of `remote` in the folder `root`."""

    def __init__(self, remote: Remote, root: Path):
        self.remote, self.root = remote, root

    def pull(self, stage: str) -> None:
        """Bring what the remote storage holds of a stage and this machine does not; before that, complete a push that was cut off.

        What the remote storage held and no longer holds is deleted here too; what never got there stays.
        """
        with self._alone():
            self._push_unpushed(stage)
            self._pull(stage)

    def _pull(self, stage: str) -> None:
        was_there, ours = self._was_there(stage), self.root / stage / MANIFEST
        found = self.remote.names(stage)
        if was_there and ("" if (self.root / stage).is_file() else MANIFEST) not in found:
            self._forget(stage)
        theirs = self.remote.read(f"{stage}/{MANIFEST}") if MANIFEST in found else b""
        manifest, same = parse_manifest(theirs), ours.exists() and theirs == ours.read_bytes()
        outputs = manifest["outputs"] if manifest else {}  # anything else there was left by an earlier run, or is incomplete
        with contextlib.suppress(_TornError):
            for name in [n for n in found if not n or n in outputs or n.startswith(".partial-")]:
                if not self._held(stage, name, outputs, same):
                    self._fetch(f"{stage}/{name}".rstrip("/"), outputs.get(name))
            if manifest and not same:  # the manifest last: it says that all the others are there
                old = read_manifest(self.root / stage)
                write_atomically(ours, theirs)
                for name in old["outputs"].keys() - outputs.keys() if old else ():
                    (self.root / stage / name).unlink(missing_ok=True)
            if (manifest or "" in found) and not self._was_there(stage):
                self._note(stage)

    def _held(self, stage: str, name: str, outputs: dict[str, Any], same: bool) -> bool:
        target = self.root / stage / name
        return target.exists() and (same or name.startswith(".partial-") or (name in outputs and describe(target) == outputs[name]))

    def _fetch(self, name: str, described: dict[str, Any] | None) -> None:
        with replacing(self.root / name) as temporary:
            self.remote.get(name, temporary)
            if described is not None and describe(temporary) != described:
                raise _TornError

    def folders(self, folder: str) -> set[str]:
        """Names of the folders in `folder`, here or in the remote storage; those deleted there are deleted here."""
        here = {p.name for p in (self.root / folder).glob("*") if p.is_dir()}
        was_there = {name for name in here if self._was_there(f"{folder}/{name}")}
        found = self.remote.names(folder)
        deleted = {name for name in was_there if f"{name}/{MANIFEST}" not in found}
        with self._alone():
            for name in deleted:
                self._forget(f"{folder}/{name}")
        return here - deleted | {name.partition("/")[0] for name in found if "/" in name}

    def push(self, name: str) -> None:
        """Copy one file to the remote storage; a manifest must come after what it names."""
        self.remote.put(name, self.root / name)
        folder, _, last = name.rpartition("/")
        if last == MANIFEST or not folder:
            self._note(folder or name)

    def _note(self, stage: str) -> None:
        """Note that the remote storage holds a stage, or a file, as it is here."""
        write_atomically(self.root / PUSHED / stage, file_digest(self._whole(stage)).encode())

    def _was_there(self, stage: str) -> bool:
        note, whole = self.root / PUSHED / stage, self._whole(stage)
        return note.is_file() and whole.is_file() and note.read_text() == file_digest(whole)

    def _whole(self, stage: str) -> Path:
        """The file that shows that a stage is complete: its manifest, or a single file itself."""
        path = self.root / stage
        return path / MANIFEST if path.is_dir() else path

    def _forget(self, stage: str) -> None:
        """Delete all of a stage here except work in progress, some of which may never have reached the remote storage."""
        path = self.root / stage
        for each in sorted(path.iterdir()) if path.is_dir() else [path]:
            if each.is_dir() and not each.name.startswith(".partial-"):
                shutil.rmtree(each)
            elif each.is_file():
                each.unlink()
        with contextlib.suppress(OSError):
            path.rmdir()

    def foreign(self, stage: str, new: dict[str, dict[str, Any]]) -> list[str]:
        """Files there in the way of a stage's outputs `new`: neither named by a manifest, nor left by a push that was cut off, nor of the same content."""
        found = self.remote.sizes(stage)
        ours = self._ours(stage, found)
        there = [n for n in new if n in found and n not in ours]
        foreign = [n for n in there if found[n] != new[n]["bytes"] or self._described(f"{stage}/{n}") != new[n]]
        return [*foreign, *([MANIFEST] if MANIFEST in found and is_another(self.remote.read(f"{stage}/{MANIFEST}")) else [])]

    def _described(self, name: str) -> dict[str, Any]:
        with scratch(self.root) as folder:
            self.remote.get(name, Path(folder) / "file")
            return describe(Path(folder) / "file")

    def _ours(self, stage: str, found: Iterable[str]) -> set[str]:
        """Names of what raybooth has put in a stage's folder there, by its manifest and by the mark of an incomplete push."""
        manifest = parse_manifest(self.remote.read(f"{stage}/{MANIFEST}")) if MANIFEST in found else None
        names = set(manifest["outputs"]) if manifest else set()
        if UNPUSHED in found:
            with contextlib.suppress(ValueError):  # the mark itself is torn: nothing came after it
                names |= set(json.loads(self.remote.read(f"{stage}/{UNPUSHED}"))["names"])
        return names

    def take_in(self, stage: str, partial: Path) -> None:
        """Make a stage's complete work in progress its outputs, here and there. After a stop in the middle the next pull of the stage completes it."""
        with self._alone():
            names = self._ours(stage, self.remote.names(stage)) | json.loads((partial / MANIFEST).read_text())["outputs"].keys()
            mark = {"partial": partial.name, "before": self._manifest_there(stage), "names": sorted(names)}
            write_atomically(self.root / stage / UNPUSHED, json.dumps(mark).encode())
            self._push_unpushed(stage)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the mirror's own lock against this machine's other processes: of workers that start together and want the same files, the first fetches them.

        It is not the lock that a run holds all the while; whoever holds this one waits for the network and for no other lock.
        """
        with (self.root / ".mirroring").open("a") as f:
            lock(f, wait=True)  # if its file system has no locks, files come more than once, but whole: each is renamed into place
            yield

    def _push_unpushed(self, stage: str) -> None:
        """Complete a push that was cut off, unless another machine has put its own there in the meantime: that is newer, and comes with the pull."""
        folder = self.root / stage
        if not (folder / UNPUSHED).exists():
            return
        mark = json.loads((folder / UNPUSHED).read_text())
        if (folder / mark["partial"] / MANIFEST).exists():
            move_in(folder / mark["partial"])
        manifest = read_manifest(folder)
        intact = manifest and all((folder / name).is_file() for name in manifest["outputs"])
        if manifest and intact and self._manifest_there(stage) in (None, mark["before"], (folder / MANIFEST).read_text()):
            before = parse_manifest((mark["before"] or "").encode())
            self._push(stage, manifest["outputs"], before["outputs"] if before else {}, mark["names"])
        (folder / UNPUSHED).unlink()

    def _push(self, stage: str, outputs: dict[str, Any], before: dict[str, Any], ours: Iterable[str]) -> None:
        """Copy a complete stage, its manifest last, then delete the work in progress there, and what else of `ours` lies there.

        What lies there from `before` and is unchanged is not copied again.
        """
        there = self.remote.sizes(stage)
        same = {n for n in outputs if n in there and before.get(n) == outputs[n] and there[n] == outputs[n]["bytes"]}
        new = [n for n in outputs if n not in same or UNPUSHED in there]  # after a push that was cut off nobody knows what is whole
        for name in [UNPUSHED, *new, MANIFEST]:
            self.push(f"{stage}/{name}")
        for name in self.remote.names(stage):
            if name.startswith(".partial-") or (name in ours and name not in outputs):
                self.remote.remove(f"{stage}/{name}")
        self.remote.remove(f"{stage}/{UNPUSHED}")

    def _manifest_there(self, stage: str) -> str | None:
        return self.remote.read(f"{stage}/{MANIFEST}").decode(errors="replace") if MANIFEST in self.remote.names(stage) else None


class _TornError(Exception):
    """A file is not what the manifest beside it says: another machine was cut off while it pushed, or is pushing now. What this machine holds stays."""
