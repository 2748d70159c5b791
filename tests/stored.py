"""Finished runs, without the fine-tuning: storages as raybooth leaves them, with random adapters."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from raybooth import config
from raybooth.families import family_of
from raybooth.families.lora import add_adapters, save_adapters
from raybooth.families.parts import load
from raybooth.files import files_under
from raybooth.pictures import png
from raybooth.sections import Lora
from raybooth.session import Run
from raybooth.stage import Stage
from raybooth.train import Parallel
from raybooth.workspace import Workspace


def alone() -> SimpleNamespace:
    """The group of a worker that has no others, in this process."""
    return SimpleNamespace(device=torch.device("cpu"), where="here", least=int, **vars(Parallel()))


def make_adapters(base: Path, target: Path, seed: int, scale: float = 0.2, **how: Any) -> None:
    """Random ones, strong enough to show, in the file that diffusers looks for."""
    family = family_of(base)
    parts = family.trainable(True)
    loaded = load(family, base, parts)
    add_adapters(family, loaded, parts, Lora(**{"rank": 4, "alpha": 8.0, **how}), seed)
    g = torch.Generator().manual_seed(seed)
    for part in parts:
        for name, parameter in loaded.modules[part].named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=g) * scale
    save_adapters(family, {part: loaded.modules[part] for part in parts}, target)


def make_run(storage: Path, base: Path, seed: int | None, sets: tuple[str, ...] = (), **how: Any) -> Path:
    """A run of adapters, or with `seed` None a whole fine-tuned model (the base itself, slightly moved)."""
    given = ["generate.steps=3", "generate.guidance=3.0", "cluster.sample_batch=4", *sets]
    made = config.load(None, given, subject={"class": "dog", "photos": ["x"]}, base={"model": str(base)}, storage=str(storage))
    storage.mkdir(parents=True, exist_ok=True)
    (storage / "config.json").write_text(json.dumps(made.model_dump(by_alias=True, mode="json")))
    workspace = Workspace(str(storage))
    stage = workspace.stage("base-model", {"of": str(base)})
    for name in files_under(base):
        _copy(base, stage, name)
    stage.finish({"source": str(base)})
    stage = workspace.stage("instance-images", {})
    stage.write("00.png", png(Image.new("RGB", (32, 32), (seed or 0, 0, 0))))
    stage.finish({"pictures": ["00.png"]})
    make_model(workspace, base, seed, **how)
    return storage


def make_model(workspace: Workspace, base: Path, seed: int | None, **how: Any) -> None:
    stage = workspace.stage("fine-tuned-model", {"seed": seed, **how})
    stage.clear()
    if seed is None:
        whole(base, stage)
    else:
        make_adapters(base, stage.partial, seed, **how)
    stage.finish(only=files_under(stage.partial))


def on_mini(storage: Path | str, photos: Path, *sets: str, class_name: str = "dog") -> Run:
    """Of two class pictures and two of one prompt, drawn in two steps."""
    small = ["prior.images=2", "prior.steps=2", "generate.steps=2", "generate.images_per_prompt=2", "generate.prompts=['photo of {subject} in the snow']"]
    subject = {"photos": [str(photos)], "class": class_name}
    return Run(config.load(None, [*small, *sets], subject=subject, base={"model": "mini"}, storage=str(storage)), quiet=True)


def teach(run: Run, seed: int, **facts: Any) -> None:
    """Random adapters as what the run has learnt."""
    stage = run.workspace.stage("fine-tuned-model", {"seed": seed})
    make_adapters(run.base_folder, stage.partial, seed)
    run.workspace.push_tree(f"fine-tuned-model/{stage.partial.name}")
    stage.finish({"history": []} | facts, only=files_under(stage.partial))


def whole(base: Path, stage: Stage) -> None:
    from raybooth.families.parts import save

    family = family_of(base)
    denoiser = load(family, base, (family.denoiser,)).modules[family.denoiser]
    for parameter in denoiser.parameters():
        parameter.data *= 1.05
    save(base, {family.denoiser: denoiser}, stage.partial)


def _copy(base: Path, stage: Stage, name: str) -> None:
    (stage.partial / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(base / name, stage.partial / name)
