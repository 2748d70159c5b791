"""The stages, in order. Each reads what the ones before it left in the storage, and does only what is missing."""

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from raybooth import selection
from raybooth.base_model import prepare_base
from raybooth.checkpoint import Checkpoints
from raybooth.drawing import class_inputs, class_rows, draw, drawing, map_into, output_rows
from raybooth.encoder_files import prepare_encoders
from raybooth.errors import MUST_BE_SHARED, RayboothError
from raybooth.extras import check_installed
from raybooth.files import files_under
from raybooth.instance_images import Photographs, prepare_photos, views_of
from raybooth.manifest import digest
from raybooth.naming import settle_token
from raybooth.photos import SMALLEST_SIDE, square
from raybooth.session import Run, StepLine, settings_of, versions
from raybooth.stage import Stage

_AS_HERE = "; what --set says here it must be told too"


def prepare(run: Run) -> None:
    """Prepare the base model and the instance images. The configuration is kept when both are there: a refused one changes nothing."""
    run.workspace.check_writable()
    run.refuse_others_files()
    if run.config.cluster.address is None:  # on a cluster its machines need to have it
        check_installed(run.config.finetune)
    with tempfile.TemporaryDirectory() as scratch:
        photos = Photographs(run, Path(scratch))
        if not photos.have_gone:  # what cannot be had shows before gigabytes are fetched
            _ = photos.here
        if not photos.held:
            _ = photos.there
        if run.manifest_of("base-model") is None:
            for photo in (*photos.here.photos, *photos.there.photos):
                square(photo, SMALLEST_SIDE)
        prepare_base(run)
        settle_token(run)
        _check_lengths(run)
        prepare_photos(run, photos)
    if run.config.evaluate.select != "last":
        prepare_encoders(run)  # what cannot be fetched shows before hours of work
    run.save_config()


def _check_lengths(run: Run) -> None:
    """Check the prompts against the length that the base model reads.

    Raises:
        RayboothError: if the subject or the class would be cut off where it is taught.
    """
    for prompt, (length, rest) in _unread(run, [run.config.subject.prompt, run.config.class_prompt]).items():
        raise RayboothError(
            f"'{prompt}' is longer than the {length} tokens that this model reads of a prompt, and '{rest}' would be cut off: "
            "shorten subject.token, subject.class or prior.prompt."
        )
    _say_unread(run)


def _say_unread(run: Run) -> None:
    for prompt, (length, rest) in _unread(run, run.config.output_prompts).items():
        run.say(f"prompts: of '{prompt}' this model reads {length} tokens, and not the end: '{rest}'")


def _unread(run: Run, prompts: Iterable[str]) -> dict[str, tuple[int, str]]:
    from raybooth.families import family_of
    from raybooth.families.reading import unread

    if run.manifest_of("base-model") is None:  # removed, or never there: a whole fine-tuned model draws without
        return {}
    return unread(family_of(run.base_folder), run.base_folder, dict.fromkeys(prompts))


def class_images(run: Run) -> None:
    """Draw pictures of the class with the base model, for prior preservation."""
    prior = run.config.prior
    if not prior.drawn:
        return run.say(f"class-images: none are wanted (prior.{'images = 0' if prior.method == 'class-images' else f'method = {prior.method}'})")
    draw(run, "class-images", "base-model", prior, class_rows(run, prior.images), class_inputs(run))


def encode(run: Run) -> None:
    """Encode instance and class images to latents (posterior mean and std), and prompts to conditioning; files are named by their content."""
    from raybooth import jobs

    stage, rows = _latents(run)
    missing = set(stage.missing(rows))
    if not missing and stage.done(rows):
        return run.say(f"latents: {len(rows)} rows, up to date")
    work = [{"name": n, **_read_row(run, rows[n])} for n in rows if n in missing]
    if work:
        run.say_why(stage)
        make = partial(jobs.encoder, run.workspace.uri, any("prompt" in row for row in work), stage.inputs["model"])
        map_into(stage, run, make, work, batch=16, title="encode", unit="row", model_stage="base-model")
    stage.finish(only=rows)


def _latents(run: Run) -> tuple[Stage, dict[str, dict[str, str]]]:
    """The latents' stage and, by file name, what each is made from."""
    stage = run.workspace.stage("latents", {"model": run.model_digest("base-model")})
    rows = {_latent_name(sha): {"stage": f"{kind}-images", "file": f, "sha256": sha} for kind, found in _pictures(run).items() for f, sha in found.items()}
    rows |= {name: {"prompt": p} for name, p in _prompt_names(run).items()}
    return stage, rows


def _pictures(run: Run) -> dict[str, dict[str, str]]:
    """The pictures that are trained on, file -> sha256 for each kind, instance and class.

    Raises:
        RayboothError: if they are not of the present settings and base model, or too few.
    """
    return {"instance": _instance_pictures(run), "class": _class_pictures(run) if run.config.prior.drawn else {}}


def _instance_pictures(run: Run) -> dict[str, str]:
    made = run.workspace.manifest("instance-images")
    _refuse_others(run, "instance-images", "prepare", made["inputs"], views_of(run))
    return {name: made["outputs"][name]["sha256"] for name in made["facts"]["pictures"]}


def _class_pictures(run: Run) -> dict[str, str]:
    prior = run.config.prior
    stage = drawing(run, "class-images", "base-model", prior, class_inputs(run))  # first: it completes what was stopped while it moved in
    made = run.workspace.manifest("class-images")
    _refuse_others(run, "class-images", "class-images", made["inputs"], stage.inputs)
    names = [row["name"] for row in class_rows(run, prior.images)]
    if not made["outputs"].keys() >= set(names):
        raise RayboothError(f"There are not prior.images = {prior.images} class-images yet: {run.workspace.first('class-images')}{_AS_HERE}.")
    return {name: made["outputs"][name]["sha256"] for name in names}


def _refuse_others(run: Run, stage: str, verb: str, made_from: dict[str, Any], wanted: dict[str, Any]) -> None:
    if others := [key for key, value in wanted.items() if made_from.get(key) != value]:
        raise RayboothError(f"The {stage} are of another {' and '.join(others)} than the present: {run.workspace.first(verb)}{_AS_HERE}.")


def _latent_name(sha256: str) -> str:
    return f"{sha256[:32]}.safetensors"


def _prompt_names(run: Run) -> dict[str, str]:
    from raybooth.families import family_of
    from raybooth.jobs import prompt_name

    if not family_of(run.base_folder).has_frozen_encoders(run.config.finetune.text_encoder):
        return {}  # all are trained, and encode them at every step
    return {prompt_name(p): p for p in (run.config.subject.prompt, run.config.class_prompt)}


def _read_row(run: Run, row: dict[str, str]) -> dict[str, Any]:
    return row if "prompt" in row else {"picture": run.workspace.read(row["stage"], row["file"], row["sha256"])}


def refuse_import(run: Run) -> None:
    """Refuse to fine-tune in place of an imported LoRA.

    Raises:
        RayboothError: if the storage holds one; it may be the only copy.
    """
    held = run.manifest_of("fine-tuned-model")
    if held and "imported" in held["inputs"]:
        raise RayboothError(f"The storage {run.config.storage} holds a LoRA that was imported, and fine-tuning would replace it: give another --storage.")


def finetune(run: Run) -> None:
    """Fine-tune the base model by the prior-preserving loss."""
    from raybooth import finetune_job
    from raybooth.cluster.fit import run_group

    config = run.config
    run.outputs("latents")  # must be here
    held = _latents(run)[0].valid_manifest
    latents = {name: output["sha256"] for name, output in held["outputs"].items()} if held else {}  # of this base model
    rows = {kind: [_latent_name(sha) for sha in found.values()] for kind, found in _pictures(run).items()}
    used = [n for names in (*rows.values(), _prompt_names(run)) for n in names]
    if not latents.keys() >= set(used):
        raise RayboothError(f"The latents do not belong to the present base model and pictures: {run.workspace.first('encode')}.")
    prompts = {"instance": config.subject.prompt, "class": config.class_prompt}
    without = {"log_every", "trackers", "checkpoint_every", "checkpoints"} | (set() if config.finetune.text_encoder else {"text_encoder_lr"})
    inputs = {
        "model": run.model_digest("base-model"),
        "rows": {k: [latents[n] for n in names] for k, names in rows.items()},
        "prompts": prompts if config.prior.preserves else {"instance": config.subject.prompt},
        "prior": {"weight": config.prior.weight, "teacher": config.prior.teacher} if config.prior.preserves else None,
        "finetune": config.finetune.model_dump(exclude=without),
        "lora": config.lora.model_dump() if config.finetune.method == "lora" else None,
        "seed": config.seed,
    }
    selects, key = config.evaluate.select != "last", digest(inputs)
    if selects:
        prepare_encoders(run)
        # Not [generate]: a model that was chosen stays chosen, whatever is drawn with it later. Its facts tell what it was chosen by.
        inputs["select"] = {"rule": config.evaluate.select, "encoders": run.model_digest("encoders")}
    stage = run.workspace.stage("fine-tuned-model", inputs)
    if stage.done():
        return run.say("fine-tuned-model: up to date")
    for name in used:
        run.workspace.output("latents", name)  # what was deleted shows here, and not in a worker
    run.say_why(stage)
    stage.clear()
    target = f"fine-tuned-model/{stage.partial.name}"
    make = partial(finetune_job.finetuner, run.workspace.uri, target, key, rows, prompts, config.prior, config.finetune, config.lora, config.seed, selects)
    starts: list[int] = []
    with StepLine(run) as line:

        def heard(word: dict[str, Any]) -> None:
            starts.extend([word["start"]] if "start" in word else [])
            line.heard(word)
            stage.keep_time()

        facts = run_group(
            make, workers=config.workers, gpus_per_worker=config.cluster.gpus_per_worker,
            retries=config.cluster.retries, have=run.ray, heard=heard,
        )  # fmt: skip
    run.workspace.pull("fine-tuned-model")
    if not files_under(stage.partial):
        raise RayboothError(f"What the workers have made is not in the storage {config.storage} of this machine: {MUST_BE_SHARED}")
    if selects:
        kept, notes = Checkpoints(run.workspace, key, config.finetune.checkpoints).complete()
        for note in notes:
            run.say(f"fine-tuned-model: {note}")
        facts["selected"] = selection.select(run, kept, target)
    facts |= {"configuration": settings_of(config), "versions": versions()}  # config.json may be another run's by the time that somebody asks
    earlier = _seconds_of_training(stage, key) if min(starts, default=0) == config.finetune.steps else 0.0
    stage.finish(facts, only=files_under(stage.partial), earlier=earlier)
    run.say(f"fine-tuned-model: {stage.folder}")


def _seconds_of_training(stage: Stage, key: str) -> float:
    """Seconds of the fine-tuning `key`, if only the choice of its model is new; else 0."""
    old = stage.manifest
    if old is None or old["digest"] == stage.key or digest({k: v for k, v in old["inputs"].items() if k != "select"}) != key:
        return 0.0
    return float(old.get("seconds", 0))


def generate(run: Run) -> None:
    """Draw pictures of every prompt with the fine-tuned model."""
    taught = run.workspace.manifest("fine-tuned-model")["inputs"].get("prompts", {}).get("instance", run.config.subject.prompt)
    if taught != run.config.subject.prompt:
        run.say(f"output-images: the model was taught '{taught}', and the subject is '{run.config.subject.prompt}' by now: 'raybooth run' would teach that.")
    _say_unread(run)
    draw(run, "output-images", "fine-tuned-model", run.config.generate, output_rows(run), {"seed": run.config.seed})


STAGES = {"prepare": prepare, "class-images": class_images, "encode": encode, "finetune": finetune, "generate": generate}
"""The stages in the order of the data; the names are the verbs of the command line."""
