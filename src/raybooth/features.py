"""Features of a run's pictures and prompts, by the encoders in its storage."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raybooth.drawing import map_into
from raybooth.manifest import digest
from raybooth.score import Array, Distances
from raybooth.session import Run

if TYPE_CHECKING:
    from raybooth.jobs import Work


def features(run: Run, folder: str, pictures: Mapping[str, tuple[str, list[str]]], prompts: Sequence[str]) -> dict[str, dict[str, Array]]:
    """The features of the pictures, by kind and stacked in their order, and of the prompts under "prompts". Only what is new is computed.

    Args:
        folder: the storage's folder for the features.
        pictures: by kind, a stage and names of its files.
        prompts: as CLIP is to read them.
    """
    from raybooth import jobs

    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    order: dict[str, list[str]] = {}
    for kind, (stage_name, names) in pictures.items():
        outputs = run.outputs(stage_name)
        order[kind] = [f"{outputs[name][:32]}.safetensors" for name in names]
        rows |= {n: partial(_picture, run, stage_name, name) for n, name in zip(order[kind], names, strict=True)}
    order["prompts"] = [jobs.prompt_name(p) for p in prompts]
    rows |= {jobs.prompt_name(p): partial(dict, prompt=p) for p in prompts}
    folder_of = _computed(run, folder, jobs.featurizer, rows, batch=16, unit="row")
    return {kind: _stacked([folder_of / n for n in names]) for kind, names in order.items()}


def lpips_distances(run: Run, groups: Mapping[str, Sequence[tuple[str, list[str]]]]) -> dict[str, list[Distances]]:
    """LPIPS distances (n, n) within each kind's groups of pictures (a stage and names of its files). Only what is new is computed."""
    from safetensors.numpy import load_file

    from raybooth import jobs

    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    order: dict[str, list[str]] = {}
    for kind, of_kind in groups.items():
        outputs = {stage: run.outputs(stage) for stage, _ in of_kind}
        order[kind] = [f"{digest([outputs[stage][name] for name in names])[:32]}.safetensors" for stage, names in of_kind]
        rows |= {n: partial(_pictures, run, *group) for n, group in zip(order[kind], of_kind, strict=True)}
    folder = _computed(run, "distances", jobs.comparer, rows, batch=1, unit="group")
    return {kind: [load_file(folder / n)["distances"].astype(np.float64) for n in names] for kind, names in order.items()}


def _picture(run: Run, stage: str, name: str) -> dict[str, Any]:
    return {"picture": (run.workspace.root / stage / name).read_bytes()}


def _pictures(run: Run, stage: str, names: list[str]) -> dict[str, Any]:
    return {"pictures": [_picture(run, stage, name)["picture"] for name in names]}


def _computed(run: Run, folder: str, work: "Callable[[str, str], Work]", rows: Mapping[str, Callable[[], dict[str, Any]]], batch: int, unit: str) -> Path:
    """Make the files that `work`, with the encoders, makes of `rows`, unless they are there; returns their folder, `folder` of the storage."""
    stage = run.workspace.stage(folder, {"encoders": run.model_digest("encoders")})
    missing = stage.missing(rows)
    if missing:
        make = partial(work, run.workspace.uri, stage.inputs["encoders"])
        made_of = [{"name": n} | rows[n]() for n in missing]
        map_into(stage, run, make, made_of, batch=batch, title=folder, unit=unit, model_stage="encoders")
    if missing or not stage.done(rows):
        stage.finish(only=rows)
    return stage.folder


def _stacked(files: list[Path]) -> dict[str, Array]:
    from safetensors.numpy import load_file

    loaded = [load_file(f) for f in files]
    return {k: np.stack([one[k] for one in loaded]).astype(np.float32) for k in loaded[0]} if loaded else {}
