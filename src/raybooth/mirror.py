"""A remote storage's mirror: a folder of this machine, read there and written through."""

import json
from collections.abc import Iterable
from pathlib import Path

from raybooth.manifest import MANIFEST, move_in, read_manifest, write_atomically
from raybooth.remote import Remote

UNPUSHED = ".unpushed"
"""In a stage's folder until the remote storage has all that was made: the work in progress that moves in, and the manifest that was there before."""


class Mirror:
    """Of `remote`, in the folder `root`."""

    def __init__(self, remote: Remote, root: Path):
        self.remote, self.root = remote, root

    def pull(self, stage: str) -> None:
        """Bring what the remote storage holds of a stage and this machine does not; before that, push what was cut off on its way there."""
        self._push_unpushed(stage)
        found = self.remote.names(stage)
        theirs = self.remote.read(f"{stage}/{MANIFEST}") if MANIFEST in found else None
        ours = self.root / stage / MANIFEST
        same = theirs is not None and ours.exists() and theirs == ours.read_bytes()
        if theirs is not None:  # what an earlier run has left beside is not part of it
            outputs = json.loads(theirs)["outputs"]
            found = [name for name in found if name in outputs or name == MANIFEST or name.startswith(".partial-")]
        for name in sorted(found, key=lambda name: name == MANIFEST):  # the manifest last: it says that all the others are there
            target = self.root / stage / name
            if not ((same or name.startswith(".partial-")) and target.exists()):
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, self.remote.read(f"{stage}/{name}".rstrip("/")))

    def take_in(self, stage: str, partial: Path) -> None:
        """Make a stage's complete work in progress its outputs, here and there. A stop in the middle is put right by the next pull of the stage."""
        mark = {"partial": partial.name, "before": self._manifest_there(stage)}
        write_atomically(self.root / stage / UNPUSHED, json.dumps(mark).encode())
        self._push_unpushed(stage)

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
