"""Pictures of a run by one of its models: which rows there are, and drawing those that are missing."""

import contextlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image

from raybooth.cluster.rows import Make, map_rows
from raybooth.manifest import digest
from raybooth.pictures import contact_sheet, png
from raybooth.sections import Generate, Prior, Sampling
from raybooth.session import Run
from raybooth.stage import Stage

SHEET = "contact-sheet.png"


def resolution(run: Run) -> int:
    """Side of every picture of the run, in pixels."""
    from raybooth.families import family_of

    run.outputs("base-model")  # reports a missing one
    return run.config.base.resolution or family_of(run.base_folder).facts(run.base_folder).resolution


def class_rows(run: Run, n: int) -> list[dict[str, Any]]:
    """Rows for the first `n` pictures of the class."""
    return [{"name": f"{i:05d}.png", "prompt": run.config.class_prompt, "seed": picture_seed(run, "class", i)} for i in range(n)]


def class_inputs(run: Run) -> dict[str, Any]:
    """The inputs of a stage of class pictures, besides its model and sampler."""
    return {"prompt": run.config.class_prompt, "seed": run.config.seed}


def output_rows(run: Run, purpose: str = "output", each: int | None = None, prompts: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row per picture, with the same seeds for every prompt, so that columns compare. Names start with the prompt's words.

    Args:
        purpose: the seeds depend on it.
        each, prompts: the number of pictures per prompt, and the prompts; default: the configuration's.
    """
    rows = []
    for prompt in run.config.output_prompts if prompts is None else prompts:
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
        for k in range(each or run.config.generate.images_per_prompt):
            name = f"{slug}-{digest(prompt)[:8]}-{k:03d}.png"
            rows.append({"name": name, "prompt": prompt, "seed": picture_seed(run, purpose, k)})
    return rows


def picture_seed(run: Run, purpose: str, index: int) -> int:
    """A picture's own seed: from the run's seed, what it is for, and its number."""
    return int(digest([run.config.seed, purpose, index])[:12], 16)


def photographs(run: Run) -> list[str]:
    """The instance images that are the photographs themselves: the first view of each, without crops and mirror images."""
    return [name for name in run.facts("instance-images")["pictures"] if "-" not in name]


def by_prompt(run: Run, name: str) -> dict[str, list[str]]:
    """The pictures in stage folder `name` by their prompts, as its manifest says, whatever the configuration says by now."""
    found: dict[str, list[str]] = {}
    rows = run.facts(name)["rows"]
    for picture in run.facts(name)["pictures"]:
        found.setdefault(rows[picture]["prompt"], []).append(picture)
    return found


def drawing(run: Run, name: str, model_stage: str, how: Prior | Generate, inputs: dict[str, Any]) -> Stage:
    """The stage `name` of pictures by the model of `model_stage`."""
    from raybooth.jobs import drawing_digest

    return run.workspace.stage(name, {"model": drawing_digest(run.workspace, model_stage), **vars(sampling(run, how)), **inputs})


def sampling(run: Run, how: Prior | Generate) -> Sampling:
    from raybooth.families import family_of

    side = resolution(run)  # first: it reports a missing base model
    return family_of(run.base_folder).sampling(how, side)


def draw(run: Run, name: str, model_stage: str, how: Prior | Generate, rows: list[dict[str, Any]], inputs: dict[str, Any]) -> None:
    """Draw the pictures of `rows` that are missing in stage folder `name`, and its contact sheet. Rows of one name are the same picture."""
    from raybooth import jobs

    rows = list({r["name"]: r for r in rows}.values())
    stage = drawing(run, name, model_stage, how, inputs)
    names = [r["name"] for r in rows]
    missing = set(stage.missing(names))
    held = stage.valid_manifest
    if not missing and held and held["facts"]["pictures"] == names and stage.done([SHEET]):
        return run.say(f"{name}: {len(names)} pictures, up to date")
    work = [r for r in rows if r["name"] in missing]
    if work:
        run.say_why(stage)
        batch = run.config.cluster.sample_batch
        make = partial(jobs.sampler, run.workspace.uri, model_stage, sampling(run, how), batch, stage.inputs["model"])
        map_into(stage, run, make, work, batch=batch, title=name, unit="picture", model_stage=jobs.pipeline_stage(run.workspace, model_stage))
    stage.write(SHEET, png(contact_sheet(_titled(stage, rows))))
    stage.finish({"pictures": names, "rows": {r["name"]: {"prompt": r["prompt"], "seed": r["seed"]} for r in rows}})
    run.say(f"{name}: {len(names)} picture{'s' * (len(names) > 1)}; look at {stage.folder / SHEET}")


def map_into(stage: Stage, run: Run, make: Make, rows: list[dict[str, Any]], *, batch: int, title: str, unit: str, model_stage: str) -> None:
    """Write the files that `make` makes of `rows` into `stage` as they are done, with a progress line.

    Args:
        model_stage: the stage folder of the model that each worker loads.
    """
    cluster = run.config.cluster
    size = model_bytes(run, model_stage)
    done = map_rows(make, rows, batch=batch, have=run.ray, retries=cluster.retries, say=run.say, samplers=cluster.samplers, model_bytes=size)
    with contextlib.closing(done):  # Ctrl-C may come while a file is written
        for name, data in run.progress(done, len(rows), title, unit):
            stage.write(name, data)


def _titled(stage: Stage, rows: list[dict[str, Any]], columns: int = 8, most: int = 64) -> list[tuple[str, list[Image.Image]]]:
    """Rows of a contact sheet: the first `most` pictures of each prompt, in lines of `columns`."""
    by_prompt: dict[str, list[str]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row["name"])
    lines = []
    for prompt, names in by_prompt.items():
        for i in range(0, min(len(names), most), columns):
            images = [Image.open(stage.path(n)).convert("RGB") for n in names[i : min(i + columns, most)]]
            lines.append((prompt if i == 0 else "", images))
    return lines


def model_bytes(run: Run, stage: str) -> int:
    """Size in bytes of the model whose files the stage holds."""
    return sum(o["bytes"] for o in run.workspace.manifest(stage)["outputs"].values())
