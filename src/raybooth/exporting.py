"""The fine-tuned model for other programs: a diffusers folder, a LoRA in two layouts, one checkpoint file, a repository of the hub."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth import card
from raybooth.disk import explained_if_full, path_of
from raybooth.drawing import resolution
from raybooth.errors import RayboothError
from raybooth.families import Family, family_of
from raybooth.files import files_under, scratch
from raybooth.naming import settle_token
from raybooth.session import Run
from raybooth.stage import Stage
from raybooth.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

    from raybooth.families.lowrank import LowRank

RANK = 32
"""Default rank of a LoRA extracted from a full fine-tuning: on mini the subject is still itself."""


@dataclass
class Model:
    """The fine-tuned model of a run: a pipeline folder, or adapters for the base model."""

    run: Run
    rank: int | None

    @cached_property
    def base(self) -> Path:
        self.run.outputs("base-model")
        return self.run.base_folder

    @cached_property
    def folder(self) -> Path:
        self.run.workspace.check_intact("fine-tuned-model")
        return self.run.model_folder

    @property
    def family(self) -> Family:
        return family_of(self.base)

    @property
    def adapted(self) -> bool:
        from raybooth.families.lora import WEIGHTS

        return (self.folder / WEIGHTS).exists()

    @property
    def name(self) -> str:
        """The name of its files, such as "unqtkn-dog"."""
        return re.sub(r"[^a-z0-9]+", "-", self.run.config.subject.name.lower()).strip("-") or "model"

    def modules(self, *parts: str) -> dict[str, Any]:
        """Parts of the model, with all that was learnt merged into their weights."""
        from raybooth.families.lora import load_merged
        from raybooth.families.parts import load

        loaded = load_merged(self.family, self.base, self.folder, parts) if self.adapted else load(self.family, self.folder, parts)
        return dict(loaded.modules)

    def low_rank(self) -> "tuple[LowRank, list[str]]":
        """The model's adapters, or a LoRA extracted from it if it has none or they are not plain LoRA; and notes on the extraction."""
        from raybooth.families.foreign import is_dora, read
        from raybooth.families.lora import WEIGHTS
        from raybooth.families.lowrank import hollow

        if self.adapted and not is_dora(self.folder / WEIGHTS):
            self.keep_rank()
            return read(self.family, hollow(self.family, self.base), self.folder / WEIGHTS), []
        return self._extracted(self.rank or RANK)

    def keep_rank(self) -> None:
        """Refuse a --rank for adapters, which keep their own.

        Raises:
            RayboothError: if one was given.
        """
        if self.rank is not None:
            raise RayboothError("This run is a LoRA already and keeps its rank: leave --rank out.")

    def _extracted(self, rank: int) -> "tuple[LowRank, list[str]]":
        from raybooth.families.extract import Energy, extract
        from raybooth.families.lowrank import even
        from raybooth.families.parts import load

        pairs, energies = {}, {}
        for part in self.family.trainable(text_encoder=True):
            base = load(self.family, self.base, (part,)).modules[part]

            def told(layers: list[Any], part: str = part) -> Iterator[Any]:
                return self.run.progress(layers, len(layers), f"rank {rank} of {part}", "layer")

            pairs[part], energies[part] = extract(part, base, self.modules(part)[part], rank, told)
        if not any(pairs.values()):
            raise RayboothError("The fine-tuned model does not differ from its base in any layer: there is nothing to extract.")
        changed = {part: energy for part, energy in energies.items() if energy.layers}
        lines = [f"rank {rank}, {part}: {energy}" for part, energy in changed.items()]
        return even(pairs), [*lines, f"rank {rank}, all: {sum(changed.values(), Energy())}"] if len(lines) > 1 else lines


def _diffusers(model: Model, target: Path) -> list[str]:
    from raybooth.families.parts import save

    if model.adapted:
        save(model.base, model.modules(*model.family.trainable(text_encoder=True)), target)
    else:
        for name in model.run.outputs("fine-tuned-model"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model.folder / name, target / name)
    return []


def _lora(model: Model, target: Path) -> list[str]:
    from raybooth.families.foreign import is_dora, write
    from raybooth.families.lora import WEIGHTS

    if model.adapted and is_dora(model.folder / WEIGHTS):
        model.keep_rank()
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.folder / WEIGHTS, target / WEIGHTS)
        return []
    low, said = model.low_rank()
    write(model.family, low, target)
    return said


def _kohya(model: Model, target: Path) -> list[str]:
    from raybooth.families.kohya import header, to_kohya
    from raybooth.families.original import lineage

    line = lineage(model.family, model.base, "A LoRA in kohya's layout")
    low, said = model.low_rank()
    about = line.header(model.name, model.run.config.subject.name, resolution(model.run), lora=True)
    _save(model, to_kohya(model.family, low), target, header(line, low, model.name) | about)
    return said


def _single_file(model: Model, target: Path) -> list[str]:
    from raybooth.families.original import lineage, marks, to_original

    line = lineage(model.family, model.base, "A single checkpoint file")
    tensors = to_original(model.family, model.modules(*model.family.weights)) | marks(model.family, model.base)
    _save(model, tensors, target, line.header(model.name, model.run.config.subject.name, resolution(model.run)))
    return []


def _save(model: Model, tensors: "dict[str, Tensor]", target: Path, header: dict[str, str]) -> None:
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / f"{model.name}.safetensors", metadata={"format": "pt"} | header)


FORMS = {"diffusers": _diffusers, "lora": _lora, "kohya": _kohya, "single-file": _single_file}


def export(run: Run, to: str, output: str | Path | None = None, rank: int | None = None, repo: str | None = None) -> str:
    """Write the fine-tuned model as one of FORMS into folder `output` (default: `exports/<to>` of the storage), or push it to the hub as `repo`.

    Args:
        rank: of a LoRA that is extracted from a full fine-tuning; default RANK.

    Returns:
        The path of the folder, or the address of the repository.

    Raises:
        RayboothError: if the run is not complete, or its model cannot have that form, or the folder holds other files.
    """
    from raybooth.families.parts import quietly

    model = Model(run, rank)
    if to not in (*FORMS, "hub"):
        raise RayboothError(f"'{to}' is no form of an export: choose {', '.join(FORMS)} or hub.")
    if repo is not None and to != "hub":
        raise RayboothError(f"--repo {repo} is for --to hub: nothing else is sent anywhere.")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise RayboothError(f"--rank {rank} is none: it is a whole number from 1 on.")
    if rank is not None and to not in ("lora", "kohya"):
        raise RayboothError(f"--rank {rank} is for --to lora and --to kohya: nothing else has a rank.")
    with quietly():
        settle_token(run)
        place = None if output is None else str(output)
        return _push(model, repo, place) if to == "hub" else str(_write(model, to, place))


def _write(model: Model, to: str, output: str | None) -> Path:
    run, stage = model.run, _stage(model, to, output)
    made = stage.valid_manifest if stage.done() else None
    if made is None:
        stage.clear()
        with explained_if_full(f"The folder {stage.folder}"):
            said = FORMS[to](model, stage.partial)
        made = {"facts": {"said": said, "files": files_under(stage.partial)}, "outputs": {}}
    facts = made["facts"]
    beside = card.files(run, to, model.name, facts["said"])
    for line in facts["said"]:
        run.say(f"{to}: {line}")
    names = [*facts["files"], *beside]
    if set(names) == set(made["outputs"]) and all((stage.folder / name).read_bytes() == data for name, data in beside.items()):
        run.say(f"{to}: {stage.folder}, up to date")
        return stage.folder
    for name, data in beside.items():
        stage.write(name, data)
    stage.finish(facts, only=names)
    run.say(f"{to}: {stage.folder}")
    return stage.folder


def _stage(model: Model, to: str, output: str | None) -> Stage:
    """The folder of the export as a stage of the storage, or of the folder that `output` lies in: written as a whole, and never over files not its own."""
    run = model.run
    inputs = {"export": to, "model": run.model_digest("fine-tuned-model"), "base": run.model_digest("base-model"), "rank": model.rank, "name": model.name}
    if output is None:
        return run.workspace.stage(f"exports/{to}", inputs)
    if not output.strip():
        raise RayboothError("--output is empty: give a folder, or leave it out for one in the storage.")
    place = Path(os.path.realpath(path_of(output, "--output")))  # resolve() fails at links that lead to themselves
    if place.is_symlink():
        raise RayboothError(f"--output {output} is a symbolic link that leads to itself: give another folder.")
    if "://" in output or (place.exists() and not place.is_dir()):
        raise RayboothError(f"--output {output} is not a folder: give the path of one, it need not exist.")
    Workspace(str(place if place.exists() else place.parent)).check_writable()
    stage = Workspace(str(place.parent)).stage(place.name, inputs)
    theirs = "export" not in (stage.manifest or {}).get("inputs", {}) and any(not p.name.startswith(".partial-") for p in place.glob("*"))
    if theirs:
        raise RayboothError(f"--output {output} holds what raybooth export did not make: give another folder, so that nothing there is replaced.")
    return stage


def _push(model: Model, repo: str | None, output: str | None) -> str:
    """Push the model as it is, a pipeline or a LoRA, with its card; a new repository is private until its owner opens it. Returns the address."""
    from raybooth import hub

    if repo is None:
        raise RayboothError("--to hub needs --repo owner/name: the repository to push to.")
    if output is not None:
        raise RayboothError("--output is not for --to hub, which leaves nothing on this machine: use --to diffusers or --to lora for a folder.")
    hub.check_may_write()  # before minutes of work, not after
    to = "lora" if model.adapted else "diffusers"
    root = model.run.workspace.root
    with explained_if_full(f"The folder {root}"), scratch(root) as place:
        folder = Path(place)
        said = FORMS[to](model, folder)
        for name, data in card.files(model.run, to, model.name, said, repo).items():
            (folder / name).write_bytes(data)
        address = hub.push(repo, folder)
    model.run.say(f"hub: {address}")
    return address
