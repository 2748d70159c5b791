"""Manifests: what a stage's complete outputs are, by their digests."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from raybooth.files import BLOCK, file_digest, files_under

MANIFEST = "manifest.json"
CONFIG_FILE = "config.json"
"""The file with a storage's configuration."""


def digest(value: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """A file's digest and size, as a manifest lists them."""
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def intact(path: Path, described: dict[str, Any]) -> bool:
    """Whether a file is what a manifest says of it."""
    if not path.is_file() or path.stat().st_size != described["bytes"]:
        return False
    # Hashing gigabytes of weights at every start would cost more than it tells; their size must do.
    return path.stat().st_size > 4 * BLOCK or file_digest(path) == described["sha256"]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return parse_manifest((folder / MANIFEST).read_bytes())
    except OSError:
        return None


def parse_manifest(data: bytes) -> dict[str, Any] | None:
    """A manifest from its bytes; None if it is torn, or not ours: the stage is not done."""
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):  # brackets nested too deep
        return None
    return manifest if isinstance(manifest, dict) and _is_ours(manifest) else None


def _is_ours(manifest: dict[str, Any]) -> bool:
    """Whether it is a manifest of a stage, or of a checkpoint, which has step and scalars instead of inputs and facts."""
    outputs, said = manifest.get("outputs"), ("inputs", "facts") if "step" not in manifest else ("scalars",)
    return (
        isinstance(manifest.get("digest"), str)
        and isinstance(outputs, dict)
        and all(isinstance(o, dict) and {"bytes", "sha256"} <= o.keys() for o in outputs.values())
        and all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in outputs)  # what is outside is not a stage's
        and all(isinstance(manifest.get(name), dict) for name in said)
        and type(manifest.get("step", 0)) is int
    )


def holds_configuration(folder: Path) -> bool:
    """Whether a run was begun in `folder`: its configuration lies there. Other programs have files of that name."""
    try:
        kept = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(kept, dict) and {"subject", "base", "finetune", "storage"} <= kept.keys()


def is_another(data: bytes) -> bool:
    """Whether `data` is not a manifest of ours but a user's file of that name. A torn one counts as ours if it begins like one, or is empty."""
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(data)
        return parse_manifest(data) is None
    head = data.strip(b"\0 \n")[:4]
    return not any(ours.startswith(head) or head.startswith(ours) for ours in (b'{\n "', b'{"'))


def model_digest(manifest: dict[str, Any]) -> str:
    """The digest of a model stage's outputs, by which pictures say what drew them."""
    return digest({name: o["sha256"] for name, o in manifest["outputs"].items()})


def move_in(partial: Path) -> None:
    """Put a complete work in progress in place of what its stage held. Idempotent: after a stop in the middle the next start completes it, and until
    then the stage is not complete.
    """
    folder, target = partial.parent, json.loads((partial / MANIFEST).read_text())
    old = read_manifest(folder)
    for name in set(old["outputs"]) - set(target["outputs"]) if old else ():
        (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    readable = (partial / MANIFEST).stat().st_mode & 0o777  # safetensors lets only the owner read its files
    for name in files_under(partial):
        if name in target["outputs"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).chmod(readable)
            os.replace(partial / name, folder / name)
    os.replace(partial / MANIFEST, folder / MANIFEST)
    for other in folder.glob(".partial-*"):  # of other inputs too: they were on the way to something not wanted now
        shutil.rmtree(other, ignore_errors=True)
