"""What goes wrong with paths that people give, and with disks that do not take what is written, in a sentence each; and file locks."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from raybooth.errors import RayboothError

_SENTENCES = {
    errno.ENOSPC: "is full: free some space, or give another folder, and run the same command again; what was complete is kept",
    errno.EDQUOT: "is over its quota: free some space, or give another folder, and run the same command again; what was complete is kept",
    errno.EFBIG: "does not take a file of this size: give a folder on another file system, or raise the limit, and run the same command again",
    errno.EACCES: "is not writable: give a folder that you may write to",
    errno.EPERM: "is not writable: give a folder that you may write to",
    errno.EROFS: "is on a read-only file system: give a folder that you may write to",
    errno.ENOTDIR: "is not a folder: give the path of a folder, it need not exist",
    errno.EEXIST: "is not a folder: give the path of a folder, it need not exist",
    errno.ENOENT: "cannot be made: give the path of a folder, it need not exist",
    errno.EISDIR: "has a folder where a file of raybooth's belongs: move it elsewhere, and run the same command again",
    errno.ENAMETOOLONG: "has a longer path than its file system takes: give a shorter one",
    errno.ELOOP: "lies behind a symbolic link that leads to itself: mend the link, or give another path",
    errno.EIO: "is on a disk or a mount that reports an input/output error: check it, or give another --storage, and run the same command again",
    errno.ESTALE: "is on a mount that has lost its server's folder (stale file handle): mount it again, and run the same command again",
}
_BELOW = {errno.ENOENT: "lacks a file that was there, or should be: 'raybooth run' makes again what is missing"}
"""What an error means for a file inside the storage, where that differs."""
_FULL = {errno.ENOSPC: ("No space left", "os error 28"), errno.EDQUOT: ("Disk quota exceeded", "os error 122"), errno.EFBIG: ("File too large", "os error 27")}
"""Words in a library's own error that mean a disk takes no more, where the number is hidden (safetensors raises no OSError)."""
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""Errors by which flock() says that another process holds a file."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Errors by which it says that the file system has no locks: some network mounts (Lustre, NFS without its lock daemon) and some in user space."""


def path_of(text: str, setting: str) -> Path:
    """`text` as a path of this machine, with ~ expanded. It need not exist.

    Args:
        setting: where it was given, for the message.

    Raises:
        RayboothError: if it cannot be a path.
    """
    shown = text if len(text) <= 100 else f"{text[:60]}..."
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except RuntimeError:  # by expanduser
        raise RayboothError(f"{setting} = '{shown}' begins with a home folder that is not known on this machine: write the path in full.") from None
    except ValueError:
        raise RayboothError(f"{setting} = {shown!r} holds a character that no path may hold: write it without.") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RayboothError(f"{setting} = '{shown}' is longer than a path may be: check it, or move what it names to a shorter one.") from None
    if any("\ud800" <= letter <= "\udfff" for letter in os.path.abspath(path)):
        raise RayboothError(f"{setting} = {shown!r} lies in a folder whose name is not in UTF-8, and could not be noted with the run: rename that folder.")
    return path


@contextlib.contextmanager
def explained_if_unreadable(path: Path | None, setting: str) -> Iterator[None]:
    """Report what may not be read at or below `path`, if one is given, in a sentence that names `setting`."""
    try:
        yield
    except PermissionError as error:
        if path is None or not str(error.filename).startswith(str(path)):
            raise
        raise RayboothError(f"{setting}: {error.filename} cannot be read ({error.strerror}): ask its owner for the right to, or give another.") from None


@contextlib.contextmanager
def explained(storage: str, root: Path) -> Iterator[None]:
    """Report what goes wrong with the files of a storage at `root` in a sentence. Errors of other files are left alone, except a full disk's."""
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename  # of a file that is put in another's place, the place
        place = root if name is None else Path(str(name))
        within = place != root and place.is_relative_to(root)
        ours = name is not None and (within or root.is_relative_to(place))  # a folder above it, which could not be made
        sentence = (_BELOW if within else {}).get(error.errno or 0) or _SENTENCES.get(error.errno or 0)
        if sentence is None or not (error.errno in _FULL or ours):
            raise
        if error.errno in (errno.ENOTDIR, errno.EEXIST) and within and (file := _in_the_way(root, place)):
            raise RayboothError(f"{file} is in the way of a folder of raybooth's: move it elsewhere, and run the same command again.") from error
        raise RayboothError(f"The storage {storage} {sentence} ({place}).") from error


def _in_the_way(root: Path, place: Path) -> Path | None:
    """The first path below `root`, on the way to `place` or `place` itself, that exists but is not a folder; None if there is none."""
    way = [place, *place.parents]
    return next((p for p in reversed(way[: way.index(root)]) if os.path.lexists(p) and not p.is_dir()), None)


def lock(file: IO[Any], wait: bool) -> bool:
    """Lock an open file against other processes. Returns whether its file system has locks.

    Raises:
        BlockingIOError: if another process holds it, unless told to wait.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        if error.errno in _HELD:
            raise BlockingIOError(*error.args) from None
        raise OSError(error.errno, error.strerror, file.name) from None
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path`. False if its file system has no locks."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _HELD
    return False


def cache_folder() -> Path:
    """The folder for what is kept on this machine between runs, and may be deleted at any time.

    Raises:
        RayboothError: if the environment names one that cannot be a path.
    """
    return path_of(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "raybooth"


@contextlib.contextmanager
def explained_if_full(place: str) -> Iterator[None]:
    """Report a full disk in its sentence, even if a library's own error hides it.

    Args:
        place: what is written to, as "The storage x".
    """
    try:
        yield
    except Exception as error:
        for number, marks in _FULL.items():
            if any(mark in str(error) for mark in marks):
                raise RayboothError(f"{place} {_SENTENCES[number]}.") from error
        raise
