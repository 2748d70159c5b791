"""Files written whole or not at all, and their digests."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 24
"""Bytes hashed at once. After every block a thread waits for Python's lock, 5 ms beside one that trains, and takes it away from that one:
hashlib.file_digest, with blocks of a quarter of a megabyte, took 4.5 s instead of 0.3 for 144 MB beside a busy thread."""


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
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write, which is then synced and renamed to it; nothing is changed if that fails."""
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
    """A temporary folder in a storage, for work too large for the machine's own temporary folder."""
    return tempfile.TemporaryDirectory(dir=root, prefix=".raybooth-scratch-")


_HALF_WRITTEN = re.compile(r"\.raybooth-(.+\.\d+\.tmp|scratch-.+)")
"""Names that only replacing() and scratch() give: a storage may be a folder with much else in it."""


def sweep(root: Path, idle: float = 3600.0) -> None:
    """Remove from a storage what killed processes left half written, if untouched for `idle` seconds: a worker may outlive its driver."""
    since = time.time() - idle
    for folder, folders, files in os.walk(root):
        for name in [n for n in (*folders, *files) if _HALF_WRITTEN.fullmatch(n)]:
            path = Path(folder) / name
            with contextlib.suppress(OSError):
                if max(p.stat().st_mtime for p in (path, *path.rglob("*"))) < since:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def files_under(folder: Path) -> list[str]:
    """Relative names of all files in a folder, sorted, except temporary ones."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(n for n in names if not n.rpartition("/")[2].endswith(".tmp"))
