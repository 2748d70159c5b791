"""A remote storage's mirror: a folder of this machine, read there and written through."""

import json
from pathlib import Path

from raybooth.manifest import MANIFEST, move_in, read_manifest, write_atomically
from raybooth.remote import Remote


class Mirror:
    """Of `remote`, in the folder `root`."""

    def __init__(self, remote: Remote, root: Path):
        self.remote, self.root = remote, root

    def pull(self, stage: str) -> None:
        """Bring what the remote storage holds of a stage and this machine does not."""
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
        """Make a stage's complete work in progress its outputs, here and there."""
        move_in(partial)
        self._push(stage)

    def _push(self, stage: str) -> None:
        """Copy a complete stage, its manifest last, then drop what was in progress."""
        manifest = read_manifest(self.root / stage)
        for name in [*(manifest["outputs"] if manifest else ()), MANIFEST]:
            self.remote.put(f"{stage}/{name}", self.root / stage / name)
        for name in self.remote.names(stage):
            if name.startswith(".partial-"):
                self.remote.remove(f"{stage}/{name}")
