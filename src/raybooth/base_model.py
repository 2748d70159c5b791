"""Brings the base model of a run into its storage: from the hub, a local folder, one checkpoint file, or mini."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.config import Config
from raybooth.disk import explained_if_full, explained_if_unreadable, path_of
from raybooth.errors import RayboothError
from raybooth.files import file_digest, files_under, scratch
from raybooth.manifest import digest, read_manifest
from raybooth.sections import Base, Sampling
from raybooth.session import Run, folder_here, kept_config
from raybooth.stage import Stage

if TYPE_CHECKING:
    from raybooth.families import Facts, Family


def prepare_base(run: Run) -> None:
    """Bring the base model into the storage: from the hub, a local folder, one checkpoint file, or mini."""
    source = local_source(run.config.base.model)
    with explained_if_unreadable(source, "base.model"):
        _prepare(run, source)


def keep_base(run: Run) -> None:
    """Prepare the base model for a look at it, as prepare_base() does, but never in place of the one that a run was made from.

    Raises:
        RayboothError: if the storage holds a run on another model.
    """
    if kept_config(run.config.storage) and (other := other_base(run.config.base, run.manifest_of("base-model"))):
        raise RayboothError(f"The storage {run.config.storage} holds a run on {other}, and not on {_named(run.config.base)}: give another --storage.")
    prepare_base(run)


def refuse_other_base(run: Run) -> None:
    """Refuse a base model other than the one in the storage, which would be used in its place, with the defaults of the one asked for.

    Raises:
        RayboothError: if they are not the same.
    """
    base, held = run.config.base, run.manifest_of("base-model")
    named = held["facts"].get("source") if held else None
    if held is None or named in (None, base.model, _place(base)) or _is_a_copy(local_source(base.model), held):
        return
    raise RayboothError(
        f"The storage {run.config.storage} holds a run on {named}, and not on {_named(base)}: leave the base out, or give another --storage. "
        f"To begin anew on {_named(base)} in this one, run 'raybooth prepare' with it first."
    )


def _is_a_copy(source: Path | None, held: dict[str, Any]) -> bool:
    """Whether a folder holds the files of the storage's model, prepared elsewhere, as on another machine. Shard lists, which storages rewrite, are skipped."""
    from raybooth.families.folder import plain_name

    if source is None or not source.is_dir():
        return False
    files = {plain_name(name): source / name for name in needed_of_folder(source) if not name.endswith(".index.json")}
    return all(name in held["outputs"] and file_digest(path) == held["outputs"][name]["sha256"] for name, path in files.items())


def _prepare(run: Run, source: Path | None) -> None:
    from raybooth.families.folder import check_weights, plain_name, settle_shards
    from raybooth.families.single import check_kind, check_whole

    base = run.config.base
    if source and any(Path(os.path.realpath(source)).is_relative_to(os.path.realpath(own)) for own in (run.base_folder, run.model_folder)):
        raise RayboothError(f"base.model = '{base.model}' is what the storage {run.config.storage} itself has made, and would replace: give another --storage.")
    if source and base.revision and base.model != "mini":
        run.say(f"base-model: base.revision = '{base.revision}' is one of the hub's, and is not looked at: {base.model} lies on this machine")
    if gone := _gone(base, run.manifest_of("base-model")):
        check_fits(run.config, run.base_folder)
        return run.say(f"base-model: {gone} has gone; the copy of the model is kept")
    if base.configuration and (source is None or not source.is_file()):
        run.say(f"base-model: base.configuration = '{base.configuration}' is not looked at: {base.model} is no single file, and has its own")
    names: list[str] = []
    if source is not None and source.is_file():
        check_kind(source)
        check_weights(source.parent, [source.name])
        check_whole(source)
    elif source is not None:
        names = needed_of_folder(source)
        check_fits(run.config, source)
        check_weights(source, names)
    stage = run.workspace.stage("base-model", _inputs(base, source))
    if stage.done():
        check_fits(run.config, stage.folder)
        return run.say("base-model: up to date")
    run.say_why(stage)
    facts: dict[str, Any] = {"source": _place(base)}
    if source is None:
        facts = _fetch(run, stage)
    elif source.is_file():
        _unpack(run, source, stage.partial)
        check_fits(run.config, stage.partial)
    else:
        facts["license"] = _licence(source)
        for name in run.progress(names, len(names), "base-model: copying", "file"):
            target = stage.partial / plain_name(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
        settle_shards(stage.partial, map(plain_name, names))
    check_weights(stage.partial, [n for n in files_under(stage.partial) if n.endswith(".safetensors")])
    stage.finish(facts, only=files_under(stage.partial))


def _inputs(base: Base, source: Path | None) -> dict[str, Any]:
    """What the base model in a storage is made from: the inputs of its stage."""
    if source is None:
        return {"repo": base.model, "revision": base.pinned_revision}
    if base.model == "mini":  # by content: reinstalled, it is still the same
        return {"files": {name: file_digest(source / name) for name in needed_of_folder(source)}}
    if source.is_file():
        return {"files": stats(source.parent, [source.name]), "configuration": _configuration_files(base)}
    return {"files": stats(source, needed_of_folder(source))}


def _configuration_files(base: Base) -> dict[str, str]:
    """Digests of the files in `base.configuration`, by which a single checkpoint is opened; none if that is not given."""
    from raybooth.families.folder import INDEX, names_in

    if not base.configuration:
        return {}
    folder = path_of(base.configuration, "base.configuration")
    names = [INDEX, *(name for name in names_in(folder) if name.endswith((".json", ".txt", ".model")))] if folder.is_dir() else []
    return {name: file_digest(folder / name) for name in names if (folder / name).is_file()}


def _gone(base: Base, held: dict[str, Any] | None) -> str | None:
    """The local model or configuration that no longer exists, if the storage, whose manifest of it is `held`, has a copy of the model; else None."""
    place = _place(base)
    if held is None or held["facts"].get("source") != place or not os.path.isabs(place):
        return None
    sources = {base.model: place} | ({base.configuration: path_of(base.configuration, "base.configuration")} if base.configuration else {})
    return next((name for name, path in sources.items() if not os.path.exists(path)), None)


def _place(base: Base) -> str:
    """The absolute path where a local model lies, or lay; "mini" for mini."""
    return base.model if base.model == "mini" else os.path.abspath(path_of(base.model, "base.model"))


def other_base(base: Base, held: dict[str, Any] | None) -> str | None:
    """What the storage's model was made from, by its manifest `held`, if that is not what `base` names; None if it is."""
    source = local_source(base.model)
    if held is None or _gone(base, held) or held["digest"] == digest(_inputs(base, source)):
        return None
    name, revision = held["facts"]["source"], held["inputs"].get("revision")
    name = f"{name}@{revision}" if revision else name
    return f"{name} as it was before its files changed" if name in (_named(base), _place(base)) else name


def _named(base: Base) -> str:
    return f"{base.model}@{base.pinned_revision}" if base.pinned_revision else base.model


def check_fits(config: Config, folder: Path) -> None:
    """Check that the model in `folder`, whose configuration files suffice, is fully described and can do what is asked of it.

    Raises:
        RayboothError: if not, naming the setting.
    """
    from raybooth.families import family_of
    from raybooth.families.folder import check_described

    family = family_of(folder)
    check_described(folder, family.weights, family.settings)
    facts, side = family.facts(folder), config.base.resolution
    family.conditioning(folder)
    _check_sampler(family, folder, "generate", family.sampling(config.generate, side or facts.resolution))
    if config.prior.drawn:
        _check_sampler(family, folder, "prior", family.sampling(config.prior, side or facts.resolution))
    if config.finetune.precision == "fp16" and family.half == "bfloat16":
        raise RayboothError(f"finetune.precision = 'fp16' is not possible with {family.name}, which overflows in it: take bf16.")
    if config.finetune.min_snr_gamma and not family.min_snr:
        raise RayboothError(f"finetune.min_snr_gamma is for models of epsilon or velocity, and {family.name} is a flow: leave it out.")
    if config.finetune.method == "lora" and config.lora.targets:
        from raybooth.families.lora import check_targets

        check_targets(family, folder, config.lora, config.finetune.text_encoder)
    if side:
        _check_side(side, family.name, facts)


def _check_sampler(family: "Family", folder: Path, section: str, how: Sampling) -> None:
    from raybooth.families.samplers import is_safe

    if how.scheduler not in family.samplers:
        raise RayboothError(f"{section}.scheduler = '{how.scheduler}' is not possible with {family.name}: choose {' or '.join(family.samplers)}.")
    if not is_safe(how.scheduler, how.steps):
        import torch

        family.scheduler(folder, how.scheduler, how.steps, family.facts(folder).latent_shape(how.resolution), torch.device("cpu"))


def _check_side(side: int, family: str, facts: "Facts") -> None:
    if side % facts.multiple:
        next_one = (side // facts.multiple + 1) * facts.multiple
        raise RayboothError(f"base.resolution = {side} is not possible with {family}: it must be a multiple of {facts.multiple}, such as {next_one}.")
    if facts.largest and side > facts.largest:
        raise RayboothError(f"base.resolution = {side} is not possible with this {family}, which knows places up to {facts.largest} pixels: lower it.")


def stats(folder: Path, names: list[str]) -> list[tuple[str, int, int]]:
    """Name, size (bytes) and modification time (ns) of files, which tell whether they are still those that were copied."""
    return [(n, (folder / n).stat().st_size, (folder / n).stat().st_mtime_ns) for n in names]


def _unpack(run: Run, file: Path, target: Path) -> None:
    """Convert a checkpoint file to a model folder, `target`, without what is not needed (a safety checker, say)."""
    from raybooth.families.single import unpack

    run.say(f"base-model: reading {file}")
    root = run.workspace.root
    with explained_if_full(f"The folder {root}"), scratch(root) as place:
        unpack(file, run.config.base.configuration, Path(place))
        for name in needed_of_folder(Path(place)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(place) / name, target / name)


def model_configuration(config: Config) -> Path:
    """A folder with at least the model's configuration files: a local source, `base.configuration`, or what a storage has prepared.

    Raises:
        RayboothError: if there is none, or the storage has prepared another model.
    """
    source = local_source(config.base.model)
    if source is not None and not source.is_file():
        return source
    if source is not None and config.base.configuration:
        return path_of(config.base.configuration, "base.configuration")
    prepared = folder_here(config.storage) / "base-model"
    if not (prepared / "model_index.json").exists():
        raise RayboothError(
            f"The model {config.base.model} is not prepared in the storage {config.storage}: run 'raybooth prepare' first, or give a local folder "
            "with --base, of which the configuration files suffice."
        )
    if other := other_base(config.base, read_manifest(prepared)):
        raise RayboothError(
            f"The storage {config.storage} holds the base model {other}, and not {_named(config.base)}: prepare this one in another --storage, "
            "or give a local folder with --base."
        )
    return prepared


def local_source(model: str, setting: str = "base.model") -> Path | None:
    """The path that `model` (base.model or an encoder) names, or None if it is a repository of the hub, as owner/name or owner/name@revision.

    Raises:
        RayboothError: naming `setting`, if it can be neither a path nor a repository.
    """
    if model == "mini":
        from raybooth.families import mini_folder

        return mini_folder()
    path = path_of(model, setting)
    named = os.path.exists(path) or path.is_absolute() or model.startswith((".", "~")) or path.suffix == ".safetensors"
    looks_local = named or model.partition("@")[0].count("/") != 1
    return path if looks_local else None


def _licence(folder: Path) -> str | None:
    """The licence that a folder's model card names, or else its manifest, if it is the base model of a storage; None if neither does."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        named: str | None = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (OSError, ValueError, YAMLError):  # people write colons into titles
        named = None
    return named or (read_manifest(folder) or {}).get("facts", {}).get("license")


def needed_of_folder(folder: Path) -> list[str]:
    """The files of a complete model folder that a pipeline needs.

    Raises:
        RayboothError: if it is not complete, or a configuration is damaged.
    """
    from raybooth.families import family_of
    from raybooth.families.folder import check_files, names_in, needed_files

    family = family_of(folder)
    names = needed_files(names_in(folder), family.weights, family.settings, str(folder))
    check_files(folder, names, str(folder))
    return names


def _fetch(run: Run, stage: Stage) -> dict[str, Any]:
    from raybooth import hub
    from raybooth.families import family_of
    from raybooth.families.folder import INDEX, check_files, needed_files

    base = run.config.base
    asked = hub.Repo(base.model, base.pinned_revision, "base.model", "base.revision")
    repo = replace(asked, revision=hub.resolve(asked))

    def choose(names: list[str], folder: Path) -> list[str]:
        if INDEX not in names:
            raise RayboothError(f"The repository {base.model} has no {INDEX}, so it is no diffusers pipeline: give one of a whole model with --base.")
        family = family_of(folder, base.model)
        return needed_files(names, family.weights, family.settings, base.model)

    def check(folder: Path, names: list[str]) -> None:
        check_files(folder, names, base.model)
        check_fits(run.config, folder)

    run.say(f"base-model: {base.model} at {repo.revision}")
    licence = hub.fetch_model(repo, stage.partial, choose, check)
    return {"source": base.model, "commit": repo.revision, "license": licence}
