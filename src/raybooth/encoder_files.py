"""Brings the encoders of the scores into the storage: from the hub, a folder, or mini."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from raybooth.base_model import local_source, stats
from raybooth.errors import RayboothError
from raybooth.families.folder import VOCABULARIES, check_weights, read_object
from raybooth.files import files_under
from raybooth.session import Run

WEIGHTS, SHARDED = "model.safetensors", "model.safetensors.index.json"
KINDS = {"dino": ("vit", "dinov2", "dinov2_with_registers"), "clip": ("clip",)}
"""The `model_type` they may have in config.json: ViTs with a class token, and both towers of CLIP. LPIPS's VGG16 is known by its weights alone."""
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_AGAIN = "copy or download it again, or name another one in [evaluate]."


def prepare_encoders(run: Run) -> None:
    """Bring the encoders into the storage. If the folder of one has gone since, the copies are kept.

    Raises:
        RayboothError: if one cannot be had, is not complete, or is of an unsuitable kind.
    """
    asked = run.config.evaluate
    models = {"dino": asked.dino, "clip": asked.clip} | ({"lpips": asked.lpips} if asked.lpips else {})
    if gone := _gone(run, models):
        run.say(f"encoders: {' and '.join(gone)} has gone; the copy of it is kept")
        return
    sources = {part: _source(part, model) for part, model in models.items()}
    files = {part: _needed(part, str(source), files_under(source)) for part, source in sources.items() if source}
    stage = run.workspace.stage("encoders", {p: stats(source, files[p]) if source else models[p] for p, source in sources.items()})
    if stage.done():
        return
    facts: dict[str, Any] = {"sources": models}
    for part, source in sources.items():
        model, target = models[part], stage.partial / part
        if source is None:
            facts[part] = _fetch(run, part, model, target)
        else:
            _check(part, model, source, files[part])
            target.mkdir(parents=True, exist_ok=True)
            for name in files[part]:
                shutil.copyfile(source / name, target / name)
        check_weights(target, [WEIGHTS])
        if part == "lpips":
            from raybooth.lpips import check

            check(target / WEIGHTS)
    stage.finish(facts, only=files_under(stage.partial))


def _gone(run: Run, models: dict[str, str]) -> list[str]:
    """Folders of encoders that no longer exist and of which the storage has a copy."""
    held = run.manifest_of("encoders")
    if held is None or held["facts"].get("sources") != models:
        return []
    copied = [part for part, made_from in held["inputs"].items() if isinstance(made_from, list) and models[part] != "mini"]
    return [models[part] for part in copied if not Path(models[part]).expanduser().exists()]


def _source(part: str, model: str) -> Path | None:
    if model == "mini":
        from raybooth.families import mini_folder

        if part == "lpips":
            raise RayboothError(
                "evaluate.lpips = 'mini': mini has no VGG16. Leave it out, and DIV is by the ViT's patches, or name one, such as timm/vgg16.tv_in1k."
            )
        return mini_folder() / {"dino": "vit", "clip": "clip"}[part]
    source = local_source(model, f"evaluate.{part}")
    if source is not None and not source.is_dir():
        other = "such as timm/vgg16.tv_in1k" if part == "lpips" else "or 'mini'"
        raise RayboothError(f"evaluate.{part} = '{model}' is no folder that is there: give one, a hub repository as owner/name, {other}.")
    return source


def _fetch(run: Run, part: str, model: str, target: Path) -> str:
    """Download an encoder from the hub; returns the commit."""
    from raybooth import hub

    name, _, revision = model.partition("@")
    repo = hub.Repo(name, revision or None, f"evaluate.{part}", f"evaluate.{part}")
    commit = hub.resolve_with(WEIGHTS, repo)
    run.say(f"encoders: {name} at {commit}")
    hub.fetch_model(replace(repo, revision=commit), target, lambda names, _: _needed(part, model, names), partial(_check, part, model))
    return commit


def _needed(part: str, model: str, names: Iterable[str]) -> list[str]:
    """The files that are needed of a folder's or repository's `names`.

    Raises:
        RayboothError: if some are missing.
    """
    wanted = [n for n in names if "/" not in n and (n.endswith((".json", ".txt")) or n == WEIGHTS) and n != SHARDED]
    if WEIGHTS not in wanted:
        if SHARDED in names:
            raise RayboothError(f"The encoder {model} has its weights in several files: name a smaller one in [evaluate], with a single {WEIGHTS}.")
        raise RayboothError(
            f"The encoder {model} has no {WEIGHTS}, and pickled weights are refused: name another one in [evaluate], or a revision that has it as "
            "owner/name@revision. A pull request is one too: owner/name@refs/pr/3 is the third of those on the Community page of the repository."
        )
    if part == "lpips":
        return [WEIGHTS]
    if "config.json" not in wanted:
        raise RayboothError(f"The encoder {model} has no config.json: {_AGAIN}")
    if not any(name in wanted for name in _PREPROCESSORS):
        raise RayboothError(f"The encoder {model} has no {_PREPROCESSORS[0]}, which says how pictures are made ready for it: {_AGAIN}")
    if part == "clip" and not any(files <= {*wanted} for files in VOCABULARIES):
        raise RayboothError(f"The encoder {model} has no vocabulary (tokenizer.json, or vocab.json and merges.txt): {_AGAIN}")
    return wanted


def _check(part: str, model: str, folder: Path, names: Iterable[str]) -> None:
    """Refuse an encoder of an unsuitable kind, by its files other than the weights."""
    if part == "lpips":
        return
    for name in ("config.json", *_PREPROCESSORS):
        if name in names:
            read_object(folder / name)
    kind = read_object(folder / "config.json").get("model_type")
    if kind not in KINDS[part]:
        raise RayboothError(f"The encoder {model} is a {kind}, and evaluate.{part} must be one of {', '.join(KINDS[part])}: name another one.")
