"""One stage's folder in a storage: complete outputs with their manifest, and work in progress beside them."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.clock import CLOCK, Clock
from raybooth.errors import RayboothError
from raybooth.files import files_under, write_atomically
from raybooth.manifest import MANIFEST, describe, digest, intact, is_another, read_manifest

if TYPE_CHECKING:
    from raybooth.workspace import Workspace


class Stage:
    """One stage's folder. `inputs` says what the outputs follow from; its digest decides whether they still hold."""

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
        """The manifest of the complete outputs, whatever their inputs were; None if there are none."""
        return read_manifest(self.folder)

    @property
    def valid_manifest(self) -> dict[str, Any] | None:
        """The manifest, if the complete outputs follow from these inputs."""
        manifest = self.manifest
        return manifest if manifest is not None and manifest["digest"] == self.key else None

    @property
    def why(self) -> str:
        """What has changed since its outputs were made, for people; empty if they hold, or there are none."""
        old = self.manifest
        if old is None or old["digest"] == self.key:
            return ""
        changed = list(differences(old["inputs"], self.inputs))
        return ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")

    def done(self, names: Iterable[str] | None = None) -> bool:
        """Whether every one of `names` (default: all outputs) is there and intact."""
        held = self.valid_manifest
        if held is None:
            return False
        outputs = held["outputs"]
        return all(n in outputs and intact(self.folder / n, outputs[n]) for n in (outputs if names is None else names))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are neither complete and intact nor among the work in progress."""
        held = self.valid_manifest
        outputs = held["outputs"] if held else {}
        return [
            n for n in names if not (self.partial / n).exists() and not (n in outputs and intact(self.folder / n, outputs[n]))
        ]  # fmt: skip

    def path(self, name: str) -> Path:
        """Where output `name` lies now."""
        return self.partial / name if (self.partial / name).exists() else self.folder / name

    def clear(self) -> None:
        """Drop the work in progress, for results that are made as a whole, but keep the time that it took."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._clock.before:
            self._clock.keep()

    def write(self, name: str, data: bytes) -> None:
        """Add one output to the work in progress."""
        write_atomically(self.partial / name, data)
        self.workspace.push(f"{self.name}/{self.partial.name}/{name}")
        self.keep_time()

    def keep_time(self) -> None:
        """Note, now and then, the time worked on this, so that work which is cut off and resumed counts from its beginning."""
        if self._clock.due:
            with contextlib.suppress(OSError, RayboothError):  # a full disk stops what has more to write
                self._clock.keep()
                self.workspace.push(f"{self.name}/{self.partial.name}/{CLOCK}")

    def finish(self, facts: dict[str, Any] | None = None, only: Iterable[str] | None = None, earlier: float = 0.0) -> dict[str, Any]:
        """Move the work in progress into place: beside what holds already, instead of what does not.

        `only` names the outputs that are still wanted; without it all that hold are kept. `earlier` are seconds of work done under other inputs.
        Returns the new manifest.
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
        for manifest in sorted(self.folder.glob(f".partial-*/{MANIFEST}")):  # of other inputs too, or its files would be in the way, as if not ours
            self.workspace.take_in(self.name, manifest.parent)

    def _refuse_to_overwrite(self, new: dict[str, dict[str, Any]], old: dict[str, Any] | None) -> None:
        mirror = self.workspace.mirror  # nothing in it is the user's, only in what it mirrors
        foreign = mirror.foreign(self.name, new) if mirror else self._foreign(new, set(old["outputs"]) if old else set())
        if foreign:
            where = f"{self.workspace.storage.rstrip('/')}/{self.name}" if mirror else self.folder
            what = f"{len(foreign)} files ({foreign[0]}, ...) are" if len(foreign) > 1 else f"{foreign[0]} is"
            raise RayboothError(
                f"In {where} {what} in the way of outputs of the same name, and no manifest says that raybooth made what is there: "
                "move it elsewhere and run the same command again."
            )

    def _foreign(self, new: dict[str, dict[str, Any]], ours: set[str]) -> list[str]:
        """What is in the way of outputs `new` and not among `ours`. Files with the same content are ours too, of a stage that has lost its manifest."""
        there = [n for n in new if n not in ours and os.path.lexists(self.folder / n)]
        foreign = [n for n in there if not (self.folder / n).is_file() or describe(self.folder / n) != new[n]]
        folders = {p.as_posix() for n in new for p in Path(n).parents} - ours
        foreign += sorted(f for f in folders if os.path.lexists(self.folder / f) and not (self.folder / f).is_dir())
        manifest = self.folder / MANIFEST
        if manifest.is_dir() or (manifest.is_file() and is_another(manifest.read_bytes())):
            foreign.append(MANIFEST)
        return foreign


def differences(old: dict[str, Any], new: dict[str, Any], below: str = "") -> Iterator[str]:
    """The differences between two trees of inputs, such as "finetune.lr was 0.1 and is 0.2"."""
    for key in [*old, *(k for k in new if k not in old)]:
        a, b, name = old.get(key), new.get(key), f"{below}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{name}.")
        elif a != b:
            short = all(v is None or isinstance(v, bool | int | float) or (isinstance(v, str) and len(v) < 60) for v in (a, b))
            yield f"{name} was {a} and is {b}" if short else f"{name} changed"
