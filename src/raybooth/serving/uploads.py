"""From photographs and a few words sent by a browser to a storage that `raybooth run` can start from."""

import json
import os
import shutil
import tempfile
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from raybooth import config as configuration
from raybooth.config import Config
from raybooth.config_layers import merged
from raybooth.errors import RayboothError
from raybooth.files import write_atomically
from raybooth.manifest import CONFIG_FILE, MANIFEST, read_manifest
from raybooth.photos import SUFFIXES, Photo, refuse_duplicates, square
from raybooth.serving.errors import ApiError
from raybooth.serving.progress import RUN_LOG
from raybooth.serving.subjects import BASE, ID, MARKS
from raybooth.workspace import link_or_copy

MOST_PHOTOGRAPHS = 50
FORM = {
    "type": "object",
    "required": ["photos", "name", "class"],
    "properties": {
        "photos": {"type": "array", "maxItems": MOST_PHOTOGRAPHS, "items": {"type": "string", "format": "binary"}},
        "name": {"type": "string", "pattern": f"^{ID.pattern}$", "description": "what it will be served as"},
        "class": {"type": "string", "description": "what it is an instance of, such as dog"},
        "token": {"type": "string", "description": "the rare word that will name it; default: unqtkn"},
    },
}
ADAPTERS: dict[str, Any] = {"finetune": {"method": "lora", "lr": 1e-4}}
"""Settings of runs started here: adapters, because those of many subjects can draw in one batch."""
# Tried on the demo's dog: DINO 0.79 (0.92 among the photographs), CLIP-T 0.52 (the base's 0.48), PRES as the base's.
# In float32: adapters of so small a model learn in two thirds of the time that bfloat16 takes on a CPU that has it.
ADAPTERS_ON_MINI: dict[str, Any] = {"finetune": {"method": "lora", "lr": 2e-3, "text_encoder_lr": 1e-3, "steps": 400, "precision": "fp32"}}


async def read(request: Request) -> tuple[dict[str, str], list[Photo]]:
    """The fields and photographs of a multipart request.

    Raises:
        ApiError: if it is not one, cannot be read, or holds too much.
    """
    if not _is_form(request.headers.get("content-type", "")):
        raise ApiError(400, "Send the photographs as multipart/form-data in UTF-8, with the fields photos, name and class.", "invalid_content_type")
    try:
        async with request.form(max_files=MOST_PHOTOGRAPHS, max_fields=8, max_part_size=4096) as form:
            files = [f for f in form.getlist("photos") if isinstance(f, UploadFile)]
            photos = [Photo(f.filename or f"photograph {i}", await f.read()) for i, f in enumerate(files, 1)]
            return {k: v.strip() for k, v in form.items() if isinstance(v, str)}, photos
    except HTTPException as error:  # what starlette makes of a broken form, or one that is too long
        if error.status_code != 400:
            raise
        raise ApiError(400, f"The upload cannot be read ({error.detail.rstrip('.')}): send 1 to {MOST_PHOTOGRAPHS} photographs.", "invalid_value") from None


def _is_form(content_type: str) -> bool:
    """Whether it is a form in UTF-8: some of Python's other encodings fail in ways of their own, or decode to what is not text."""
    kind, told = parse_options_header(content_type)
    return kind == b"multipart/form-data" and told.get(b"charset", b"utf-8").lower() in (b"utf-8", b"utf8")


def check_name(name: str, taken: Container[str]) -> None:
    """Refuse (ApiError) a name that a folder or a model may not have, or that is taken."""
    if not ID.fullmatch(name):
        message = f"The name {name!r} is not possible: use letters, digits, dots, dashes and underscores, at most 64, a letter or digit first."
        raise ApiError(400, message, "invalid_value", "name")
    if name.lower() in MARKS or name.lower().endswith(".safetensors"):
        raise ApiError(400, f"The name {name} is not possible: files of a run are called so. Choose another.", "invalid_value", "name")
    if name.lower() == BASE or name in taken:
        raise _taken(name)


def settings(storage: Path, base: dict[str, Any], fields: dict[str, str], overrides: Iterable[str] = ()) -> Config:
    """The configuration of a run started here: adapters on the server's base (a section of the configuration), and `overrides` as the command line's --set.

    Raises:
        RayboothError: naming the field, what is wrong with it and what to do.
    """
    subject: dict[str, Any] = {"photos": [str(storage / "photographs")], "class": fields.get("class", "")}
    if fields.get("token"):
        subject["token"] = fields["token"]
    values = {"subject": subject, "base": base, "storage": str(storage)}
    return configuration.load(None, overrides, **merged(ADAPTERS_ON_MINI if base["model"] == "mini" else ADAPTERS, values))


def store(storage: Path, config: Config, photos: list[Photo], base: Path | None = None) -> None:
    """Make a storage with the photographs, numbered (the names that came with them are dropped), and the configuration: whole or not at all.

    Args:
        base: where the base model lies now. Another storage's is copied, as it is: the run need not fetch what the server has.

    Raises:
        RayboothError: if there are no photographs, or one cannot be read, is too small, or is there twice.
        ApiError: if there is a storage of that name already.
    """
    if not photos:
        raise RayboothError("There are no photographs: choose three to ten pictures of the subject.")
    refuse_duplicates((photo, square(photo, 64).tobytes()) for photo in photos)
    storage.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".upload-", dir=storage.parent))
    try:
        for i, photo in enumerate(photos):
            suffix = Path(photo.name).suffix.lower()
            write_atomically(scratch / "photographs" / f"{i:02d}{suffix if suffix in SUFFIXES else '.jpg'}", photo.data)
        text = json.dumps(config.model_dump(by_alias=True, mode="json"), indent=1, ensure_ascii=False)
        write_atomically(scratch / CONFIG_FILE, text.encode())
        write_atomically(scratch / RUN_LOG, b"")
        if base:
            _copy_base(base, scratch / "base-model")
        scratch.chmod(0o755)  # mkdtemp's are for their owner alone
        refuse_taken(storage)
        os.rename(scratch, storage)
    except OSError:
        refuse_taken(storage)  # by another upload, in between
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copy_base(folder: Path, target: Path) -> None:
    """Copy what the manifest of a run's base model names, as it is."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("stage") != target.name:
        return  # a model of the user's: the run copies it by itself
    try:
        for name in [*manifest["outputs"], MANIFEST]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(folder / name, target / name)
    except FileNotFoundError:  # that storage is just being removed: the run gets the base from where it came from
        shutil.rmtree(target)


def refuse_taken(storage: Path) -> None:
    if storage.exists():
        raise _taken(storage.name)


def _taken(name: str) -> ApiError:
    return ApiError(409, f"There is a subject {name} already: choose another name.", "name_taken", "name")
