"""A storage behind a URI, by fsspec. Errors of its store or the network become sentences."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from raybooth.disk import explained_if_full
from raybooth.errors import RayboothError, reason

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""raybooth's extra that the store of each scheme needs."""


class Remote:
    """Files by their names below `uri`.

    Raises:
        RayboothError: from every method, if the store fails or refuses.
    """

    def __init__(self, uri: str):
        self.uri = uri
        with self._explained("opened"):
            import fsspec

            self._fs, base = fsspec.core.url_to_fs(uri)
            self._base = base.rstrip("/")
            self._is_there(base)

    def check_writable(self) -> None:
        """Write a file and remove it."""
        probe = f"{self._base}/.writable-{uuid.uuid4().hex}"
        with self._explained("written to"):
            self._fs.makedirs(self._base, exist_ok=True)
            self._fs.pipe_file(probe, b"raybooth")
            self._fs.rm_file(probe)

    @property
    def is_memory(self) -> bool:
        """Whether it is this process's own memory, which no other process can open and which ends with it."""
        return "memory" in self._fs.protocol

    def names(self, folder: str) -> list[str]:
        """Names of all files in a folder, relative to it; none if there is no such folder, one empty name if it is itself a file."""
        return list(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int | None]:
        """The bytes of each file, by its name as in names(); None where the store does not tell."""
        place = f"{self._base}/{folder}"
        with self._explained("read"):
            self._fs.invalidate_cache()  # some stores remember what they have listed, and other processes write there too
            found = self._fs.find(place, detail=True) if self._is_there(place) else {}
            return {name[len(place) :].lstrip("/"): about.get("size") for name, about in found.items()}

    def read(self, name: str) -> bytes:
        with self._explained("read"):
            return bytes(self._fs.cat_file(f"{self._base}/{name}"))

    def get(self, name: str, file: Path) -> None:
        """Copy a file from there into `file`, piece by piece: it may be larger than the memory."""
        with explained_if_full(f"The folder {file.parent}"), self._explained("read"):
            self._fs.get_file(f"{self._base}/{name}", str(file))

    def put(self, name: str, file: Path) -> None:
        """Copy a file of this machine there."""
        target = f"{self._base}/{name}"
        with self._explained("written to"):
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(file), target)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        with self._explained("written to"):
            if self._is_there(f"{self._base}/{name}"):
                self._fs.rm(f"{self._base}/{name}", recursive=True)

    def _is_there(self, place: str) -> bool:
        """Whether there is a file or folder at `place`. Not by fsspec's exists(): for most stores that says no when the network fails."""
        try:
            self._fs.info(place)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @contextlib.contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every store has errors of its own
            scheme = self.uri.partition("://")[0]
            if isinstance(error, ImportError) and scheme in EXTRAS:
                raise RayboothError(f"The storage {self.uri} needs a package that is not installed: pip install 'raybooth[{EXTRAS[scheme]}]'.") from error
            raise RayboothError(
                f"The storage {self.uri} cannot be {done} ({reason(error)}): check the address, the network and your rights there, "
                "or give a folder with --storage."
            ) from error
