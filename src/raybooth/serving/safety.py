"""Finds the safety checker of a base model, which a run does not keep."""

import shutil
from pathlib import Path

from raybooth.base_model import local_source
from raybooth.disk import cache_folder
from raybooth.errors import RayboothError
from raybooth.families.folder import read_index
from raybooth.families.safety import PARTS, needed
from raybooth.files import files_under
from raybooth.manifest import digest, read_manifest


def checker_folder(base: Path) -> Path | None:
    """A folder with the safety checker of the base model in folder `base`; None if that model has none.

    Raises:
        RayboothError: if it has one that cannot be found or fetched.
    """
    index = read_index(base)
    if not all((index.get(part) or [None])[0] for part in PARTS):
        return None
    facts = (read_manifest(base) or {"facts": {}})["facts"]
    source = local_source(facts["source"]) if "source" in facts else base
    for folder in (base, source):
        if folder and all((folder / part).is_dir() for part in PARTS):
            return folder
    if source is not None:
        raise RayboothError(f"The base model {base} has a safety checker, which is neither there nor in {source}: copy its folders there, or use --safety off.")
    return _fetched(facts["source"], facts["commit"])


def _fetched(repo: str, commit: str) -> Path:
    """The checker's folder, fetched from the hub and kept for the next time."""
    from raybooth import hub

    cache = cache_folder() / f"safety-{digest([repo, commit])[:16]}"
    if not cache.is_dir():
        partial = cache.with_name(f".{cache.name}.partial")
        hub.fetch_model(hub.Repo(repo, commit, "--base", "--base"), partial, lambda names, folder: needed(names))
        if not any(n.endswith(".safetensors") for n in files_under(partial)):
            shutil.rmtree(partial)
            raise RayboothError(f"The safety checker of {repo} has only pickled weights, which can run any code when they are opened: use --safety off.")
        partial.rename(cache)
    return cache
