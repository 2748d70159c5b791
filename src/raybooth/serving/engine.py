"""Draws any of the subjects: those with adapters on the one base in a common batch, the others each as a model of its own. No Ray, no HTTP."""

import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raybooth.errors import RayboothError
from raybooth.families import Loaded, family_of
from raybooth.families.folder import INDEX
from raybooth.families.foreign import matrices, merge
from raybooth.families.lora import WEIGHTS, load_adapters
from raybooth.families.lowrank import hollow
from raybooth.jobs import for_inference
from raybooth.manifest import intact, model_digest, read_manifest
from raybooth.sample import Sampler
from raybooth.sections import Sampling
from raybooth.serving.adapters import Adapters, slot_bytes
from raybooth.serving.subjects import Subject

Look = Callable[[Sequence[int]], np.ndarray]
"""Indices of rows -> (n, h, w, 3) uint8: their pictures, as far as they can be told by now."""
MEMORY = 2 << 30  # bytes of all adapters together
Watch = Callable[[int, Look], None]
"""Called after each step with the number of steps done, and may look. What it raises ends the drawing."""


@dataclass(frozen=True)
class Row:
    """One picture that is wanted."""

    subject: Subject
    prompt: str
    seed: int


class Engine:
    """One base model in memory, with the adapters of up to `slots` subjects, and up to `whole` models that cannot share it.

    Args:
        rank: of the largest adapters that share the base; larger ones count as models of their own.
        slots: at most; fewer where those of this rank would take more than MEMORY, but as many as a batch may need.
    """

    def __init__(self, base: Subject, rank: int, slots: int = 32, whole: int = 2):
        self.base, self.rank, self.batch, self.whole = base, rank, base.batch, whole
        folder = base.weights
        self.family = family = family_of(folder)
        loaded = _without_its_folder(for_inference(folder, (family.denoiser, "vae", *family.encoders)))
        self._hollow = hollow(family, folder)
        room = MEMORY // slot_bytes([loaded.modules[part] for part in self._hollow], rank)
        self.adapters = Adapters(loaded.modules, max(min(slots, room), self.batch), rank)
        self.sampler = Sampler(family, loaded, base.sampling, self.batch, self.adapters.use)
        self._models: OrderedDict[str, Sampler] = OrderedDict()

    def shared(self, subject: Subject) -> bool:
        """Whether a subject is drawn on the common base."""
        return subject.base == self.base.base and (subject.kind == "base" or 0 < subject.rank <= self.rank)

    def group(self, row: Row) -> tuple[str, int]:
        """A row's group, and how many rows of it make a batch: those of one group and of equal settings may be drawn together."""
        return ("", self.batch) if self.shared(row.subject) else (_key(row.subject), row.subject.batch)

    def draw(self, rows: Sequence[Row], sampling: Sampling, watch: Watch | None = None) -> np.ndarray:
        """Draw rows of one group, at most a batch: (n, h, w, 3) uint8 pictures.

        Raises:
            RayboothError: if a subject's weights are gone or damaged.
        """
        adapters = []
        for row in rows:
            self.ready(row.subject)
            adapters.append(row.subject.model if self.shared(row.subject) and row.subject.kind == "lora" else "")
        sampler = self.sampler if self.shared(rows[0].subject) else self._models[_key(rows[0].subject)]

        def look(step: int, clean: torch.Tensor) -> None:
            if watch:
                watch(step, lambda rows: sampler.decoded(clean[list(rows)]))

        return sampler.draw_batch([r.prompt for r in rows], [r.seed for r in rows], adapters, sampling, look if watch else None)

    def ready(self, subject: Subject) -> None:
        """Make sure that a subject's weights are in memory.

        Raises:
            RayboothError: if they are gone, damaged, or do not fit the base.
        """
        try:
            if not self.shared(subject):
                self._load_whole(subject)
            elif subject.kind == "lora" and subject.model in self.adapters:
                self.adapters.held.move_to_end(subject.model)  # so that it does not make way for another of its own batch
            elif subject.kind == "lora":
                pairs = matrices(self.family, self._hollow, subject.weights if _is_file(subject) else subject.weights / WEIGHTS)
                _check(subject)
                self.adapters.put(subject.model, pairs)
        except Exception as error:  # whatever libraries raise on files that go, change under them or do not fit: nobody else's pictures may fail by it
            raise RayboothError(f"The model '{subject.id}' cannot be loaded: {error}") from error

    def _load_whole(self, subject: Subject) -> None:
        if _key(subject) not in self._models:
            while len(self._models) >= self.whole:
                self._models.popitem(last=False)
            folder = subject.base_folder if subject.kind == "lora" else subject.weights
            family = family_of(folder)
            loaded = _without_its_folder(for_inference(folder, (family.denoiser, "vae", *family.encoders)))
            if _is_file(subject):
                merge(family, loaded, subject.weights)
            elif subject.kind == "lora":
                load_adapters(family, loaded, subject.weights)
            _check(subject)
            self._models[_key(subject)] = Sampler(family, loaded, subject.sampling, subject.batch)
        self._models.move_to_end(_key(subject))


def _key(subject: Subject) -> str:
    """The key of a model of its own: the same adapters may be used on several bases."""
    return f"{subject.base} {subject.model}"


def _is_file(subject: Subject) -> bool:
    """Whether a subject is a file of adapters and not a run, whether it is still there or not."""
    return subject.weights.suffix == ".safetensors"


def _check(subject: Subject) -> None:
    """Refuse weights that are not those that were found: a run that is made anew replaces its files one by one."""
    if _is_file(subject):
        return
    manifest = read_manifest(subject.weights)
    outputs = manifest["outputs"] if manifest and model_digest(manifest) == subject.model else {}
    if not outputs or not all(intact(subject.weights / name, described) for name, described in outputs.items()):
        raise RayboothError("it is just being replaced, try again in a moment.")


def _without_its_folder(loaded: Loaded) -> Loaded:
    """The model with its few settings in a folder of its own: the storage that it came from may go."""
    scratch: Any = tempfile.TemporaryDirectory(prefix="raybooth-")
    loaded.kept["scratch"] = scratch  # goes with the model
    shutil.copyfile(loaded.folder / INDEX, Path(scratch.name) / INDEX)
    shutil.copytree(loaded.folder / "scheduler", Path(scratch.name) / "scheduler")
    loaded.folder = Path(scratch.name)
    return loaded
