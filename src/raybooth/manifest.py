"""Manifests: what a stage's complete outputs are, by their digests; files written whole or not at all."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
KEPT = "config.json"
"""A storage's configuration."""
BLOCK = 1 << 24
"""Bytes hashed at once. After every block a thread waits for Python's lock, 5 ms beside one that trains, and takes it away from that one:
hashlib.file_digest with its quarter of a megabyte took 4.5 s in place of 0.3 for 144 MB beside a busy thread."""


def digest(value: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as f:
        try:
            while block := f.read(BLOCK):
                found.update(block)
        except OSError as error:  # of a failing disk: the system does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from None
    return found.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which is then synced and renamed; nothing is changed if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".raybooth-{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def scratch(root: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder in a storage for work that is too large for the machine's own place for such."""
    return tempfile.TemporaryDirectory(dir=root, prefix=".raybooth-scratch-")


_HALF_WRITTEN = re.compile(r"\.raybooth-(.+\.\d+\.tmp|scratch-.+)")
"""Names of what replacing() and scratch() give to write to, and nobody else: a storage may be a folder with much else in it."""


def sweep(root: Path, idle: float = 3600.0) -> None:
    """Remove from a storage what was half written there by who was killed, if it was not touched for `idle` seconds: a worker may outlive its driver."""
    since = time.time() - idle
    for folder, folders, files in os.walk(root):
        for name in [n for n in (*folders, *files) if _HALF_WRITTEN.fullmatch(n)]:
            path = Path(folder) / name
            with contextlib.suppress(OSError):
                if max(p.stat().st_mtime for p in (path, *path.rglob("*"))) < since:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def describe(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def files_under(folder: Path) -> list[str]:
    """Relative names of all files, but temporary ones."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(n for n in names if not n.rpartition("/")[2].endswith(".tmp"))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return parsed((folder / MANIFEST).read_bytes())
    except OSError:
        return None


def parsed(data: bytes) -> dict[str, Any] | None:
    """A manifest; None if it is torn, or not ours: the stage is not done."""
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):  # brackets in brackets
        return None
    return manifest if isinstance(manifest, dict) and _is_ours(manifest) else None


def _is_ours(manifest: dict[str, Any]) -> bool:
    """Of a stage, or of a checkpoint, which says its step instead of inputs and facts."""
    outputs, said = manifest.get("outputs"), ("inputs", "facts") if "step" not in manifest else ("scalars",)
    return (
        isinstance(manifest.get("digest"), str)
        and isinstance(outputs, dict)
        and all(isinstance(o, dict) and {"bytes", "sha256"} <= o.keys() for o in outputs.values())
        and all(isinstance(manifest.get(name), dict) for name in said)
        and type(manifest.get("step", 0)) is int
    )


def holds_configuration(folder: Path) -> bool:
    """Whether a run was begun in `folder`: its configuration lies there. Other programs have files of that name."""
    try:
        kept = json.loads((folder / KEPT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(kept, dict) and {"subject", "base", "finetune", "storage"} <= kept.keys()


def is_another(data: bytes) -> bool:
    """Whether it is no manifest of ours: a user's file of that name. What is torn was ours if it begins like one, or holds nothing."""
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(data)
        return parsed(data) is None
    head = data.strip(b"\0 \n")[:4]
    return not any(ours.startswith(head) or head.startswith(ours) for ours in (b'{\n "', b'{"'))


def model_digest(manifest: dict[str, Any]) -> str:
    """Of a model stage's outputs: what pictures say they are drawn by."""
    return digest({name: o["sha256"] for name, o in manifest["outputs"].items()})


def move_in(partial: Path) -> None:
    """Put a complete work in progress in place of what its stage held. Idempotent: a stop in the middle is put right by the next start, and until then
    the stage is not complete.
    """
    folder, target = partial.parent, json.loads((partial / MANIFEST).read_text())
    old = read_manifest(folder)
    for name in set(old["outputs"]) - set(target["outputs"]) if old else ():
        (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    readable = (partial / MANIFEST).stat().st_mode & 0o777  # safetensors makes its files for their owner alone
    for name in files_under(partial):
        if name in target["outputs"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).chmod(readable)
            os.replace(partial / name, folder / name)
    os.replace(partial / MANIFEST, folder / MANIFEST)
    for other in folder.glob(".partial-*"):  # of other inputs too: they were on the way to something not wanted now
        shutil.rmtree(other, ignore_errors=True)
