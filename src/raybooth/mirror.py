"""A remote storage's mirror: a folder of this machine, read there and written through."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from raybooth.disk import lock
from raybooth.manifest import MANIFEST, describe, move_in, parsed, read_manifest, replacing, write_atomically
from raybooth.remote import Remote

UNPUSHED = ".unpushed"
"""In a stage's folder until the remote storage has all that was made: the work in progress that moves in, and the manifest that was there before."""


class Mirror:
    """Of `remote`, in the folder `root`."""

    def __init__(self, remote: Remote, root: Path):
        self.remote, self.root = remote, root

    def pull(self, stage: str) -> None:
        """Bring what the remote storage holds of a stage and this machine does not; before that, push what was cut off on its way there."""
        with self._alone():
            self._push_unpushed(stage)
            self._pull(stage)

    def _pull(self, stage: str) -> None:
        found, ours = self.remote.names(stage), self.root / stage / MANIFEST
        theirs = self.remote.read(f"{stage}/{MANIFEST}") if MANIFEST in found else b""
        manifest, same = parsed(theirs), ours.exists() and theirs == ours.read_bytes()
        outputs = manifest["outputs"] if manifest else {}  # what else lies there an earlier run has left, or it is not whole
        with contextlib.suppress(_TornError):
            for name in [n for n in found if not n or n in outputs or n.startswith(".partial-")]:
                if not self._held(stage, name, outputs, same):
                    self._fetch(f"{stage}/{name}".rstrip("/"), outputs.get(name))
            if manifest and not same:  # the manifest last: it says that all the others are there
                write_atomically(ours, theirs)

    def _held(self, stage: str, name: str, outputs: dict[str, Any], same: bool) -> bool:
        target = self.root / stage / name
        return target.exists() and (same or name.startswith(".partial-") or (name in outputs and describe(target) == outputs[name]))

    def _fetch(self, name: str, described: dict[str, Any] | None) -> None:
        with replacing(self.root / name) as temporary:
            self.remote.get(name, temporary)
            if described is not None and describe(temporary) != described:
                raise _TornError

    def take_in(self, stage: str, partial: Path) -> None:
        """Make a stage's complete work in progress its outputs, here and there. A stop in the middle is put right by the next pull of the stage."""
        with self._alone():
            mark = {"partial": partial.name, "before": self._manifest_there(stage)}
            write_atomically(self.root / stage / UNPUSHED, json.dumps(mark).encode())
            self._push_unpushed(stage)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of this machine's processes: workers that start together want the same files, and the first of them brings these for all.

        Not the lock of a run, which holds that one all the while; whoever holds this one waits for the network and for no other lock.
        """
        with (self.root / ".mirroring").open("a") as f:
            lock(f, wait=True)  # without locks there, files come more than once, but whole: each is renamed into place
            yield

    def _push_unpushed(self, stage: str) -> None:
        """Not if another machine has put its own there in the meantime: that is newer, and comes with the pull."""
        folder = self.root / stage
        if not (folder / UNPUSHED).exists():
            return
        mark = json.loads((folder / UNPUSHED).read_text())
        if (folder / mark["partial"] / MANIFEST).exists():
            move_in(folder / mark["partial"])
        manifest = read_manifest(folder)
        intact = manifest and all((folder / name).is_file() for name in manifest["outputs"])
        if manifest and intact and self._manifest_there(stage) in (None, mark["before"], (folder / MANIFEST).read_text()):
            self._push(stage, manifest["outputs"])
        (folder / UNPUSHED).unlink()

    def _push(self, stage: str, outputs: Iterable[str]) -> None:
        """Copy a complete stage, its manifest last, then drop what was in progress."""
        for name in [*outputs, MANIFEST]:
            self.remote.put(f"{stage}/{name}", self.root / stage / name)
        for name in self.remote.names(stage):
            if name.startswith(".partial-"):
                self.remote.remove(f"{stage}/{name}")

    def _manifest_there(self, stage: str) -> str | None:
        return self.remote.read(f"{stage}/{MANIFEST}").decode(errors="replace") if MANIFEST in self.remote.names(stage) else None


class _TornError(Exception):
    """A file is not what the manifest beside it says: another machine was cut off while it pushed, or is pushing now. What this machine holds stays."""
