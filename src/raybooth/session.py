"""A run: configuration, storage and Ray, and what the stages made."""

import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raybooth.config import Config
from raybooth.disk import explained, path_of
from raybooth.errors import RayboothError
from raybooth.files import write_atomically
from raybooth.manifest import CONFIG_FILE, holds_configuration, model_digest, read_manifest
from raybooth.stage import Stage
from raybooth.workspace import Workspace

if TYPE_CHECKING:
    from PIL.Image import Image

    from raybooth.cluster.session import Resources

T = TypeVar("T")
LOOSE = (CONFIG_FILE, "metrics.jsonl", "before-after.png", "report.html")
"""Files of a storage that lie in no stage's folder."""
MADE = ("instance-images", "class-images", "output-images")
"""The pictures of `raybooth run`."""


class Run:
    """One run. Stages are functions of it; Ray starts when the first of them needs it.

    Use it as a context manager: it holds the storage's lock and shuts Ray down at the end. One that does not write (`writes`) does without
    the lock if it may not write there.
    """

    def __init__(self, config: Config, quiet: bool = False, writes: bool = True):
        self.config, self.quiet, self.writes = config, quiet, writes
        self.workspace = Workspace(config.storage)
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        if self.writes or os.access(self.workspace.root, os.W_OK):
            self._exit.enter_context(self.workspace.locked(self.say))
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            self._exit.__exit__(*exc)
        finally:
            self.__dict__.pop("ray", None)

    @cached_property
    def ray(self) -> "Resources":
        """What the cluster has; starts or joins Ray on first use."""
        from raybooth.cluster.session import check_workers, connected

        cluster = self.config.cluster
        have = self._exit.enter_context(connected(cluster.address))
        if have.gpus and have.here and cluster.address is None:
            have = self._usable(have)
        check_workers(self.config.workers[0], cluster.gpus_per_worker, have)  # before hours of drawing, not after
        return have

    def _usable(self, have: "Resources") -> "Resources":
        """The part of the resources that torch can use: Ray counts what GPUs there are.

        Raises:
            RayboothError: if torch is built for GPUs but can use none: whoever pays for them would wait for hours.
        """
        if version("torch").endswith("+cpu"):
            self.say("torch is its CPU build here and cannot use what this machine has of GPUs: install the CUDA build ('make demo TORCH=cuda').")
            return replace(have, gpus=0)
        import torch

        if not torch.cuda.is_available():
            raise RayboothError(
                f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the GPUs of this machine, most likely because their driver is too old "
                "for it ('nvidia-smi' says for which CUDA it is): update it, install a torch that goes with it, or set CUDA_VISIBLE_DEVICES= to work on CPUs."
            )
        return have

    def say(self, text: str) -> None:
        """Print `text` on a line of its own, above the progress line."""
        from tqdm import tqdm

        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def say_why(self, stage: Stage) -> None:
        """Say why a stage that was made before is made anew: that may take hours."""
        if why := stage.why:
            self.say(f"{stage.name}: made anew, for {why}")

    def progress(self, things: Iterable[T], total: int, title: str, unit: str) -> Iterator[T]:
        """Yield `things` under a line that shows how many, at which rate, and the time left."""
        from tqdm import tqdm

        yield from tqdm(things, desc=title, total=total, unit=unit, disable=self.quiet, dynamic_ncols=True, file=sys.stderr)

    @property
    def base_folder(self) -> Path:
        return self.workspace.root / "base-model"

    @property
    def model_folder(self) -> Path:
        """The folder of the fine-tuned model: a pipeline that plain diffusers opens, or adapters."""
        return self.workspace.root / "fine-tuned-model"

    @property
    def model_form(self) -> str:
        """What lies in `model_folder`, for people."""
        return "opens in plain diffusers" if (self.model_folder / "model_index.json").exists() else "adapters for the base model, for load_lora_weights"

    def outputs(self, stage: str) -> dict[str, str]:
        """The sha256 of each of a stage's outputs, by name.

        Raises:
            RayboothError: if it has not been run.
        """
        return {name: o["sha256"] for name, o in self.workspace.manifest(stage)["outputs"].items()}

    def model_digest(self, stage: str) -> str:
        return model_digest(self.workspace.manifest(stage))

    def facts(self, stage: str) -> dict[str, Any]:
        return self.workspace.manifest(stage)["facts"]

    def manifest_of(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a stage, None if it has not been run."""
        self.workspace.pull(stage)
        return read_manifest(self.workspace.root / stage)

    def images(self, what: str = "output") -> list["Image"]:
        """The pictures of a stage, as PIL images: "instance", "class", "output", or a stage folder's own name.

        Raises:
            RayboothError: if there are none.
        """
        from PIL import Image

        stage = next((name for name in (what.strip("/"), f"{what}-images") if name in MADE or ("-images" in name and self.manifest_of(name))), "")
        if not stage:
            raise RayboothError(
                f"There are no pictures '{what}' in the storage {self.config.storage}: name 'instance', 'class', 'output', or a stage's folder."
            )
        names = self.facts(stage).get("pictures") or sorted(self.outputs(stage))
        images = []
        for name in names:
            with Image.open(self.workspace.root / stage / name) as image:
                images.append(image.convert("RGB"))
        return images

    def save_config(self) -> None:
        """Keep the configuration beside what it made, for people, and for verbs that are given none."""
        values = settings_of(self.config)
        if not self.workspace.remote:
            values["storage"] = str(self.workspace.root)
        write_atomically(self.workspace.root / CONFIG_FILE, json.dumps(values, indent=1, ensure_ascii=False).encode())
        self.workspace.push(CONFIG_FILE)

    def refuse_others_files(self) -> None:
        """Refuse a storage with files of a user's that a run would overwrite: beside its stages' folders it writes some that no manifest names.

        Raises:
            RayboothError: if there is one of such a name, and no run was begun there.
        """
        root = self.workspace.root
        for name in LOOSE:
            self.workspace.pull(name)
            if holds_configuration(root):
                return
            if os.path.lexists(root / name):
                raise RayboothError(
                    f"{name} in the storage {self.config.storage} is none that raybooth made, and it would write its own there: "
                    "move that file elsewhere, or give another --storage."
                )


def settings_of(config: Config) -> dict[str, Any]:
    """A configuration as plain values, to be kept with what it made: paths of this machine are absolute, as it is read again in other folders."""
    values = config.model_dump(by_alias=True, mode="json")
    values["subject"]["photos"] = [_absolute(source) for source in config.subject.photos]
    for section, key in (("base", "model"), ("base", "configuration"), ("evaluate", "dino"), ("evaluate", "clip"), ("evaluate", "lpips")):
        values[section][key] = _absolute(values[section][key])
    return values


def _absolute(value: str | None) -> str | None:
    """The absolute path of what exists; names on the hub, addresses and mini stay as they are."""
    path = os.path.expanduser(value) if value and value != "mini" else ""
    return os.path.abspath(path) if os.path.exists(path) else value


def version(name: str) -> str:
    """The version of an installed package, for people."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """The versions of what this machine computes with."""
    return {name: version(name) for name in ("raybooth", "torch", "diffusers", "transformers", "ray")}


def folder_here(storage: str, *names: str) -> Path:
    """This machine's folder with what it has of a storage: the storage itself, or its mirror, into which the stages or files `names` are brought first."""
    if "://" not in storage:
        return path_of(storage, "storage")
    workspace = Workspace(storage)
    for name in names:
        workspace.pull(name)
    return workspace.root


def kept_config(storage: str) -> Path | None:
    """The path of the configuration that a storage holds; None if no run was begun there."""
    path = folder_here(storage, CONFIG_FILE) / CONFIG_FILE
    with explained(storage, path.parent):
        return path if path.is_file() else None


def config_in(storage: str) -> Path:
    """The path of the configuration that a storage holds, like kept_config().

    Raises:
        RayboothError: if no run was begun there.
    """
    path = kept_config(storage)
    if path is None:
        raise RayboothError(f"There is no run in {storage}: check the name of the storage, or begin one there with 'raybooth run'.")
    return path


class StepLine:
    """The driver's live progress line of a fine-tuning."""

    def __init__(self, run: Run):
        from tqdm import tqdm

        total = run.config.finetune.steps
        self.bar = tqdm(total=total, desc="finetune", unit="step", disable=run.quiet, dynamic_ncols=True)

    def heard(self, word: dict[str, Any]) -> None:
        if "note" in word:
            return self.bar.write(f"fine-tuned-model: {word['note']}", file=sys.stderr)
        if "start" in word:
            return self._start(word["start"])
        parts = ", ".join(f"{k} {word[k]:.4f}" for k in ("loss", "instance", "prior"))
        rate = word["images_per_second"]
        self.bar.set_postfix_str(f"{parts}, {rate:.1f} images/s" if rate else parts, refresh=False)
        self.bar.update(word["step"] - self.bar.n)

    def _start(self, step: int) -> None:
        """Set the line to the step where a group begins or resumes, perhaps an older one: rate and time left count from now."""
        self.bar.initial = 0  # drop that of the group before: reset() shows the line, and would count back from there
        self.bar.reset()
        self.bar.n = self.bar.initial = self.bar.last_print_n = step
        self.bar.refresh()

    def __enter__(self) -> "StepLine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()
