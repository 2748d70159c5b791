"""The stages, in order. Each reads what the ones before it left in the storage, and does only what is missing."""

import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from raybooth.base_model import prepare_base
from raybooth.config import Generate, Prior, Sampling
from raybooth.errors import RayboothError
from raybooth.photos import SUFFIXES, Photo, contact_sheet, gather, is_remote, png, views
from raybooth.session import Run, StepLine
from raybooth.workspace import Stage, digest, files_under

SHEET = "contact-sheet.png"


def prepare(run: Run) -> None:
    """The base model and the instance images."""
    run.save_config()
    prepare_base(run)
    prepare_photos(run)


def resolution(run: Run) -> int:
    """Side of every picture of the run, in pixels."""
    if run.config.base.resolution:
        return run.config.base.resolution
    from raybooth.families import family_of

    return family_of(run.base_folder).facts(run.base_folder).resolution


def prepare_photos(run: Run) -> None:
    """People's photographs to instance images: upright RGB squares of the base's resolution."""
    subject, side = run.config.subject, resolution(run)
    sources = subject.photos
    with tempfile.TemporaryDirectory() as scratch:

        def fetch(spec: str) -> Path:
            from raybooth import hub

            return hub.fetch_dataset(spec, Path(scratch) / digest(spec)[:16], SUFFIXES)

        local = [s for s in sources if not is_remote(s)]
        there = gather(local, fetch) if local else None
        # A remote source stands for itself: what was fetched once is kept, and nothing is fetched to see whether it changed.
        inputs = {
            "photos": [p.sha256 for p in there.photos] if there else [],
            "remote": [s for s in sources if is_remote(s)],
            "resolution": side,
            "crops": [subject.crops, run.config.seed if subject.crops else None, subject.flip],
        }
        stage = run.workspace.stage("instance-images", inputs)
        for name, reason in there.skipped if there else ():
            run.say(f"instance-images: skipped {name}: {reason}")
        held = stage.held
        if sources and held and stage.done():
            return run.say(f"instance-images: {len(held['facts']['pictures'])} pictures, up to date")
        gathered = gather(sources, fetch)
        images = [(photo, views(photo, side, subject.crops, subject.flip, str(run.config.seed))) for photo in gathered.photos]
    _write_instances(run, stage, images, gathered.skipped)


def _write_instances(run: Run, stage: Stage, images: list[tuple[Photo, list[Image.Image]]], skipped: list[tuple[str, str]]) -> None:
    """`02.png` is the third photograph, `02-1.png` its second view."""
    pictures = {f"{i:02d}{f'-{k}' if k else ''}.png": view for i, (_, views) in enumerate(images) for k, view in enumerate(views)}
    for name, image in pictures.items():
        stage.write(name, png(image))
    title = f"{run.config.subject.prompt}: what the model will see"
    stage.write(SHEET, png(contact_sheet([(title if not k else "", list(row)) for k, row in enumerate(zip(*(v for _, v in images), strict=True))])))
    sources = [{"name": photo.name, "sha256": photo.sha256} for photo, _ in images]
    stage.finish({"pictures": list(pictures), "sources": sources, "skipped": skipped}, only=[*pictures, SHEET])
    what = f"{len(pictures)} views of " if len(pictures) > len(images) else ""
    run.say(f"instance-images: {what}{len(images)} photographs; look at {stage.folder / SHEET}")


def class_images(run: Run) -> None:
    """Pictures of the class by the base model, for prior preservation."""
    prior, prompt = run.config.prior, run.config.class_prompt
    if prior.drawn:
        draw(run, "class-images", "base-model", prior, class_rows(run, prior.images), {"prompt": prompt, "seed": run.config.seed})


def class_rows(run: Run, n: int) -> list[dict[str, Any]]:
    """The first `n` pictures of the class."""
    return [{"name": f"{i:05d}.png", "prompt": run.config.class_prompt, "seed": _seed(run, "class", i)} for i in range(n)]


def encode(run: Run) -> None:
    """Instance and class images to latents (posterior mean and std), prompts to conditioning; named by their content."""
    from raybooth import jobs
    from raybooth.cluster.rows import map_rows

    stage, rows = _latents(run)
    missing = set(stage.missing(rows))
    if not missing and stage.done(rows):
        return run.say(f"latents: {len(rows)} rows, up to date")
    work = [{"name": n, **_read_row(run, rows[n])} for n in rows if n in missing]
    if work:
        done = map_rows(
            partial(jobs.encoder, run.workspace.uri, any("prompt" in row for row in work)), work, batch=16, have=run.ray,
            samplers=run.config.cluster.samplers, model_bytes=model_bytes(run, "base-model"),
        )  # fmt: skip
        for name, data in run.progress(done, len(work), "encode", "row"):
            stage.write(name, data)
    stage.finish(only=rows)


def _latents(run: Run) -> tuple[Stage, dict[str, dict[str, str]]]:
    """The latents' stage and, by name, what each is made from."""
    stage = run.workspace.stage("latents", {"model": run.model_digest("base-model")})
    rows = {_latent_name(sha): {"stage": s, "file": f} for s in ("instance-images", "class-images") for f, sha in _pictures(run, s).items()}
    rows |= {name: {"prompt": p} for name, p in _prompt_names(run).items()}
    return stage, rows


def _pictures(run: Run, stage: str) -> dict[str, str]:
    """File -> sha256 of the pictures that are trained on."""
    if stage == "class-images" and not run.config.prior.drawn:
        return {}
    outputs = run.outputs(stage)
    return {name: outputs[name] for name in run.facts(stage)["pictures"]}


def _latent_name(sha256: str) -> str:
    return f"{sha256[:32]}.safetensors"


def _prompt_names(run: Run) -> dict[str, str]:
    from raybooth.jobs import prompt_name

    if run.config.finetune.text_encoder:
        return {}  # it is trained, and encodes them at every step
    return {prompt_name(p): p for p in (run.config.subject.prompt, run.config.class_prompt)}


def _read_row(run: Run, row: dict[str, str]) -> dict[str, Any]:
    return row if "prompt" in row else {"picture": (run.workspace.root / row["stage"] / row["file"]).read_bytes()}


def finetune(run: Run) -> None:
    """The base model to the fine-tuned model, by the prior-preserving loss."""
    from raybooth import tuning
    from raybooth.cluster.fit import run_group

    config = run.config
    latents = run.outputs("latents")
    rows = {k: [_latent_name(sha) for sha in _pictures(run, f"{k}-images").values()] for k in ("instance", "class")}
    absent = [n for names in rows.values() for n in names if n not in latents]
    if absent:
        raise RayboothError("The latents do not belong to the present pictures: run 'raybooth encode' first, or 'raybooth run' for all.")
    prompts = {"instance": config.subject.prompt, "class": config.class_prompt}
    inputs = {
        "model": run.model_digest("base-model"),
        "rows": {k: [latents[n] for n in names] for k, names in rows.items()},
        "prompts": prompts,
        "prior": {"method": config.prior.method, "weight": config.prior.weight},
        "finetune": config.finetune.model_dump(exclude={"log_every", "trackers", "checkpoint_every", "checkpoints"}),
        "lora": config.lora.model_dump() if config.finetune.method == "lora" else None,
        "seed": config.seed,
    }
    stage = run.workspace.stage("fine-tuned-model", inputs)
    if stage.done():
        return run.say("fine-tuned-model: up to date")
    stage.clear()
    target = f"fine-tuned-model/{stage.partial.name}"
    make = partial(tuning.finetuner, run.workspace.uri, target, stage.key, rows, prompts, config.prior, config.finetune, config.lora, config.seed)
    with StepLine(run) as line:
        facts = run_group(
            make, workers=config.cluster.worker_range, gpus_per_worker=config.cluster.gpus_per_worker,
            retries=config.cluster.retries, have=run.ray, heard=line.heard,
        )  # fmt: skip
    run.workspace.pull("fine-tuned-model")
    stage.finish(facts, only=files_under(stage.partial))
    run.say(f"fine-tuned-model: {stage.folder}")


def generate(run: Run) -> None:
    """Pictures of every prompt by the fine-tuned model."""
    draw(run, "output-images", "fine-tuned-model", run.config.generate, output_rows(run), {"seed": run.config.seed})


def output_prompts(run: Run) -> list[str]:
    return [run.config.fill(p) for p in run.config.generate.prompts]


def output_rows(run: Run) -> list[dict[str, Any]]:
    """One row a picture: the same seeds for every prompt, so that columns compare. Names start with the prompt's words."""
    rows = []
    for prompt in output_prompts(run):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48]
        for k in range(run.config.generate.images_per_prompt):
            name = f"{slug}-{digest(prompt)[:8]}-{k:03d}.png"
            rows.append({"name": name, "prompt": prompt, "seed": _seed(run, "output", k)})
    return rows


def _seed(run: Run, purpose: str, index: int) -> int:
    """A picture's own seed: from the run's seed, what it is for, and its number."""
    return int(digest([run.config.seed, purpose, index])[:12], 16)


def draw(run: Run, name: str, model_stage: str, how: Prior | Generate, rows: list[dict[str, Any]], inputs: dict[str, Any]) -> None:
    """The pictures of `rows` that are missing in stage folder `name`, and its contact sheet."""
    from raybooth import jobs
    from raybooth.cluster.rows import map_rows

    sampling = Sampling(how.steps, how.guidance, how.scheduler, resolution(run))
    model = run.model_digest(model_stage)
    stage = run.workspace.stage(name, {"model": model, **vars(sampling), **inputs})
    names = [r["name"] for r in rows]
    missing = set(stage.missing(names))
    held = stage.held
    if not missing and held and held["facts"]["pictures"] == names and stage.done([SHEET]):
        return run.say(f"{name}: {len(names)} pictures, up to date")
    work = [r for r in rows if r["name"] in missing]
    if work:
        batch = run.config.cluster.sample_batch
        done = map_rows(
            partial(jobs.sampler, run.workspace.uri, model_stage, sampling, batch, model), work, batch=batch, have=run.ray,
            samplers=run.config.cluster.samplers, model_bytes=model_bytes(run, model_stage),
        )  # fmt: skip
        for file, data in run.progress(done, len(work), name, "picture"):
            stage.write(file, data)
    stage.write(SHEET, png(contact_sheet(_titled(stage, rows))))
    stage.finish({"pictures": names})
    run.say(f"{name}: {len(names)} pictures; look at {stage.folder / SHEET}")


def _titled(stage: Stage, rows: list[dict[str, Any]], columns: int = 8, most: int = 64) -> list[tuple[str, list[Image.Image]]]:
    """Rows of a contact sheet: a prompt each, broken into lines of `columns`."""
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
    return sum(o["bytes"] for o in run.workspace.manifest(stage)["outputs"].values())


STAGES = {"prepare": prepare, "class-images": class_images, "encode": encode, "finetune": finetune, "generate": generate}
"""The way of the data, in order; the names are the verbs of the command line."""
