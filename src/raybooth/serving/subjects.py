"""The subjects that can be drawn: runs in their storages and files of adapters, found by looking, known by an id.

An id is only ever looked up among those that were found, so that no name becomes a path.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raybooth import config as configuration
from raybooth.base_model import needed_of_folder
from raybooth.config import Config
from raybooth.disk import path_of
from raybooth.errors import RayboothError
from raybooth.families import family_of
from raybooth.families.folder import plain_name
from raybooth.families.foreign import plain_rank
from raybooth.families.lora import WEIGHTS
from raybooth.files import file_digest
from raybooth.manifest import CONFIG_FILE, MANIFEST, digest, model_digest, read_manifest
from raybooth.prompts import asks_for_subject, filled
from raybooth.sections import Sampling
from raybooth.workspace import Workspace

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
BASE = "base"
"""The id of the base model itself, which is a model too."""
MARKS = (CONFIG_FILE, "fine-tuned-model", WEIGHTS)
"""Names that tell the storage of a run, or the folder of a LoRA, from a folder of these: nothing in such a folder may be called so."""


@dataclass(frozen=True)
class Subject:
    """Who or what can be drawn.

    Attributes:
        weights: the folder of the model, or the folder or file of the adapters.
        base_folder: the folder of the base model.
        base, model: digests of the base model and of the weights.
        rank: the largest of its adapters; 0 where it cannot share a pass with others (a whole model, DoRA, adapters of convolutions).
        batch: pictures in one forward pass, on which a picture's last bits depend.
        photographs: files of the instance images.
        created: when its weights were made, in seconds since 1970.
    """

    id: str
    kind: Literal["base", "lora", "full"]
    weights: Path
    base_folder: Path
    base: str
    model: str
    sampling: Sampling
    batch: int
    created: int
    rank: int = 0
    token: str | None = None
    class_name: str | None = None
    photographs: tuple[Path, ...] = ()

    @property
    def drawn_by(self) -> str:
        """Digest of all that its pictures follow from, as those of `raybooth generate` carry it; with adapters, of the base model too."""
        return digest([self.model, self.base]) if self.kind == "lora" else self.model

    @property
    def prompt(self) -> str | None:
        return f"photo of {self.token} {self.class_name}" if self.token else None

    def fill(self, prompt: str) -> str:
        """`prompt` with {subject}, {token} and {class} filled in.

        Raises:
            RayboothError: if it asks for what this model does not have.
        """
        if self.token is None and asks_for_subject(prompt):
            raise RayboothError(f"The model '{self.id}' has no subject of its own: write the prompt without {{subject}}, {{token}} and {{class}}.")
        return filled(prompt, self.token or "", self.class_name or "")


def of_base(folder: Path, config: Config | None = None, base: str | None = None) -> Subject:
    """The subject of a base model, with the settings of a run that was made on it, or the defaults."""
    if base is None:
        base = digest({plain_name(n): file_digest(folder / n) for n in needed_of_folder(folder)})  # as the manifest of a run's base-model has it
    if config is None:
        from raybooth.families import mini_folder

        config = configuration.load(subject={"class": "thing"}, base={"model": "mini" if folder == mini_folder() else str(folder)})
    return Subject(BASE, "base", folder, folder, base, base, _sampling(config, folder), config.cluster.sample_batch, int(folder.stat().st_mtime))


def of_run(root: Path, name: str) -> Subject | None:
    """The subject of a run's storage; None as long as its model is not complete.

    Raises:
        RayboothError: if what belongs to it is missing or damaged.
    """
    weights, base_folder = root / "fine-tuned-model", root / "base-model"
    manifest, base = read_manifest(weights), read_manifest(base_folder)
    if manifest is None:
        return None
    if base is None:
        raise RayboothError(f"The run {root} has no complete base-model.")
    adapters = weights / WEIGHTS if WEIGHTS in manifest["outputs"] else None
    if adapters and manifest["inputs"].get("model", model_digest(base)) != model_digest(base):
        raise RayboothError(f"The adapters of the run {root} belong to another base model than the one that lies there now.")
    config = configuration.load(root / CONFIG_FILE)
    photographs = (read_manifest(root / "instance-images") or {"facts": {}})["facts"].get("pictures", [])
    return Subject(
        id=name,
        kind="lora" if adapters else "full",
        weights=weights,
        base_folder=base_folder,
        base=model_digest(base),
        model=model_digest(manifest),
        sampling=_sampling(config, base_folder),
        batch=config.cluster.sample_batch,
        created=int((weights / MANIFEST).stat().st_mtime),
        rank=plain_rank(adapters) if adapters else 0,
        token=config.subject.token,
        class_name=config.subject.class_name,
        photographs=tuple(root / "instance-images" / Path(name).name for name in photographs),
    )


def _sampling(config: Config, base_folder: Path) -> Sampling:
    family = family_of(base_folder)
    return family.sampling(config.generate, config.base.resolution or family.facts(base_folder).resolution)


def of_file(file: Path, base: Subject) -> Subject:
    """The subject of a file of adapters, in whatever layout, taken to belong to `base`.

    Raises:
        RayboothError: if the file is damaged, or holds no adapters that can be drawn with.
    """
    rank, sha = plain_rank(file), digest({WEIGHTS: file_digest(file)})
    return Subject(_id_of_file(file), "lora", file, base.base_folder, base.base, sha, base.sampling, base.batch, int(file.stat().st_mtime), rank)


def folder_of(base: Subject, found: Mapping[str, Subject]) -> Path | None:
    """A folder that holds a base model now, if any: it is the same in every run's, and the one that it was found in may be gone by now."""
    places = [base.weights, *(s.base_folder for s in found.values() if s.base == base.base)]
    return next((p for p in places if p.is_dir()), None)


class Subjects:
    """The subjects under `paths`, each of which is a run's storage, a file of adapters, or a folder of either.

    Args:
        base: the base model to serve, a folder; default: that of the first run found.
        say: hears, once, why something that is there is passed over.
    """

    def __init__(self, paths: Sequence[str], base: Path | None = None, every: float = 1.0, say: Callable[[str], object] = str):
        self.every, self.say = every, say
        self._paths = dict(map(_local, paths))
        for path in self._paths:
            if _candidate(path) and not ID.fullmatch(name := self._id(path)):
                raise RayboothError(f"{path} cannot be served: its name '{name}' {_NAME}")
        self._base = of_base(base) if base else None
        self._known: dict[Path, tuple[tuple[int, ...], Subject | str | None]] = {}
        self._found: dict[str, Subject] = {}
        self._said: set[str] = set()
        self._looked, self._lock = 0.0, threading.Lock()

    @property
    def base(self) -> Subject:
        """The base model that is served, the same from when one was first found.

        Raises:
            RayboothError: if there is none yet.
        """
        self.found()
        if self._base is None:
            where = ", ".join(map(str, self._paths))
            raise RayboothError(f"There is no finished run in {where}: give the storage of one, or name the base model with --base (a local folder, or mini).")
        return self._base

    def found(self) -> dict[str, Subject]:
        """Id -> subject, the base first. Looks again after `every` seconds."""
        with self._lock:
            if not self._looked or time.monotonic() - self._looked >= self.every:
                self._found = self._look()
                self._looked = time.monotonic()
            return self._found

    def names(self) -> set[str]:
        """Ids that are taken: of what can be drawn, and of what lies there and cannot be drawn, or not yet."""
        return {*self.found(), *map(self._id, self._known)}

    def _look(self) -> dict[str, Subject]:
        candidates = list(dict.fromkeys(c for path in self._paths for c in self._candidates(path)))
        self._known = {c: self._known.get(c, ((), None)) for c in candidates}
        runs = [s for c in candidates if not _is_file_of_adapters(c) and (s := self._read(c))]
        if self._base is None and runs:
            first = runs[0]
            self._base = of_base(first.base_folder, configuration.load(first.base_folder.parent / CONFIG_FILE), first.base)
        files = [s for c in candidates if _is_file_of_adapters(c) and self._base and (s := self._read(c))]
        found = {BASE: self._base} if self._base else {}
        for subject in [*runs, *files]:
            if not ID.fullmatch(subject.id):
                self._note(f"{subject.weights} is passed over: its name '{subject.id}' {_NAME}")
            elif found.setdefault(subject.id, subject) is not subject:
                self._note(f"{subject.weights} is passed over: there is another model named '{subject.id}'.")
        return found

    def _read(self, path: Path) -> Subject | None:
        """The subject at a path, read anew only if its files have changed; None if it has no model yet, or cannot be read."""
        before: tuple[int, ...] = ()
        held, subject = self._known[path]
        try:
            before = _state(path)
            if held != before or subject is None:
                subject = of_file(path, self._base) if self._base and _is_file_of_adapters(path) else of_run(path, self._id(path))
        except (RayboothError, OSError, ValueError, KeyError, TypeError) as error:  # whatever lies there, the others are served
            subject = f"{path} is passed over: {error}"
            self._note(subject)
        self._known[path] = before, subject
        return subject if isinstance(subject, Subject) else None

    def _candidates(self, path: Path) -> Iterator[Path]:
        """Storages of runs and files of adapters, in the order of their names. What cannot be looked into is passed over."""
        try:
            own = _candidate(path)
            children = [] if own or not path.is_dir() else sorted(p for p in path.iterdir() if not p.name.startswith("."))
        except OSError as error:
            return self._note(f"{path} is passed over: {error}")
        if own:
            yield own
        for child in children:
            try:
                found = _candidate(child)
            except OSError as error:
                self._note(f"{child} is passed over: {error}")
            else:
                if found:
                    yield found

    def _id(self, path: Path) -> str:
        return _id_of_file(path) if _is_file_of_adapters(path) else self._paths.get(path, path.name)

    def _note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)


_NAME = "is not one of letters, digits, dots, dashes and underscores, at most 64: rename it, or give a link to it."


def _local(path: str) -> tuple[Path, str]:
    """Where a served path lies on this machine, and its name. What is behind a URI is mirrored once, as the server starts."""
    if "://" not in path:
        folder = path_of(path, "PATH").absolute()
        if not folder.exists():
            raise RayboothError(f"There is no {path} to serve: give the storage of a run, a folder of them, or a .safetensors file of adapters.")
        return folder, folder.name
    workspace = Workspace(path)
    for stage in (CONFIG_FILE, "base-model", "instance-images", "fine-tuned-model"):
        workspace.pull(stage)
    return workspace.root, path.rstrip("/").rpartition("/")[2]


def _candidate(path: Path) -> Path | None:
    """A storage of a run or a file of adapters: `path` itself, or the one that it is the folder of."""
    if _is_file_of_adapters(path) or (path / "fine-tuned-model").is_dir():
        return path
    return path / WEIGHTS if (path / WEIGHTS).is_file() else None


def _is_file_of_adapters(path: Path) -> bool:
    return path.suffix == ".safetensors" and not path.is_dir()


def _id_of_file(file: Path) -> str:
    return file.parent.name if file.name == WEIGHTS else file.stem


_PARTS = ("fine-tuned-model/manifest.json", "base-model/manifest.json", "instance-images/manifest.json", CONFIG_FILE)


def _state(path: Path) -> tuple[int, ...]:
    """Modification times of the files that a subject is read from; a folder's own changes too often."""
    files = [path] if _is_file_of_adapters(path) else [path / p for p in _PARTS]
    return tuple(f.stat().st_mtime_ns if f.exists() else 0 for f in files)
