"""Where photographs come from: files, folders, http(s) URLs, datasets of the hub."""

import http.client
import os
import re
import string
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from raybooth.disk import path_of
from raybooth.errors import RayboothError, reason
from raybooth.manifest import holds_configuration, read_manifest
from raybooth.photos import SUFFIXES, Photo, refuse_duplicates

HUB = "hf://"
MOST = 1000  # photographs; whoever gives more has probably given the wrong folder
LARGEST_DOWNLOAD = 64 << 20  # bytes
LONGEST_DOWNLOAD = 300.0  # seconds


@dataclass(frozen=True)
class Gathered:
    """What was found: photographs, and what was passed over as (name, reason)."""

    photos: list[Photo] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def is_remote(source: str) -> bool:
    return source.lower().startswith(("http://", "https://", HUB))


def gather(sources: Sequence[str], storage: Path | None = None) -> Gathered:
    """The photographs in files and folders of this machine, which are read when they are needed.

    Links are followed, and a file counts once, however often it is found. Skipped with the reason: hidden files and folders, files whose names
    are not a picture's, and what raybooth itself has made: the folder `storage`, other storages, stages of any.

    Raises:
        RayboothError: if a source does not exist, there is no photograph at all or far too many, or two are the same.
    """
    found = _Found(storage)
    try:
        for path in map(_existing, sources):
            found.add(path, str(path))
        return _checked(found.gathered, sources)
    except OSError as error:
        raise RayboothError(
            f"{_readable(str(error.filename))} cannot be read ({error.strerror}): check the path given with --photos, its disk, and your right to read it."
        ) from None


def _existing(source: str) -> Path:
    path = path_of(source, "subject.photos")
    try:
        path.lstat()
    except FileNotFoundError:
        raise RayboothError(_absent(source, path)) from None
    refuse_configurations([source])
    return path


def refuse_configurations(sources: Iterable[str]) -> None:
    """Refuse configurations among the sources of photographs.

    Raises:
        RayboothError: if there is one.
    """
    for path in (path_of(source, "subject.photos") for source in sources if source.endswith((".toml", ".json"))):
        if path.is_file():
            raise RayboothError(f"{_readable(str(path))} is a configuration and no photograph: put it before --photos, which takes all that comes after it.")


def _absent(source: str, path: Path) -> str:
    """What to say about a source that does not exist; it may be an address of an unsupported kind."""
    scheme, colon, rest = source.partition("://")
    if colon and scheme.lower() == "file":
        return f"{source} is no path: write it without {scheme}://, as {unquote(rest)}."
    if colon and scheme.isalnum():
        return (
            f"Photographs are not fetched from {scheme}://, as in {_without_password(source)}: download them first, and give files, folders, "
            f"http(s):// addresses, or datasets of the hub ({HUB}owner/name)."
        )
    hint = ""
    if source.lower().startswith("www."):
        hint = f" (an address is written https://{source})"
    elif len(path.parts) == 2 and not path.is_absolute():
        hint = f" (a dataset of the hub is written {HUB}{path})"
    return f"There is no photograph or folder {_readable(str(path))}{hint}: check the path given with --photos."


def fetch(sources: Sequence[str], dataset: Callable[[str], Path]) -> Gathered:
    """The photographs behind URLs and in datasets of the hub, which `dataset` downloads to a folder.

    Raises:
        RayboothError: if one cannot be fetched, there is no photograph at all or far too many, or two are the same.
    """
    found = _Found()
    for source in dict.fromkeys(sources):
        if source.lower().startswith(HUB):
            found.add(dataset(source[len(HUB) :]), source)
        else:
            found.gathered.photos.append(Photo(source, _download(source)))
    return _checked(found.gathered, sources)


def _checked(gathered: Gathered, sources: Sequence[str]) -> Gathered:
    if not gathered.photos:
        seen = "".join(f"; {name}: {reason}" for name, reason in gathered.skipped[:3])
        where = f" in {', '.join(sources)}" if sources else ""
        raise RayboothError(f"There are no photographs{where}{seen}: give three to ten pictures of the subject with --photos.")
    refuse_duplicates((photo, photo.sha256) for photo in gathered.photos)  # before any is decoded
    return gathered


class _Found:
    """What has been found so far; `storage` is looked into only if it is itself given, not below another folder."""

    def __init__(self, storage: Path | None = None):
        self.gathered = Gathered()
        self._storage = os.path.realpath(storage) if storage else None
        self._seen: set[str] = set()

    def add(self, path: Path, name: str) -> None:
        """Add a file, or all that is in a folder in the order of names; messages call it `name`."""
        real = os.path.realpath(path)
        if real in self._seen:
            return
        self._seen.add(real)
        if path.is_dir():
            made = _made_besides(path)
            for child in sorted(path.iterdir()):
                self._child(child, f"{name}/{child.name}", "made by raybooth" if child.name in made else self._why_not(child))
        else:
            self._photo(path, name)

    def _child(self, path: Path, name: str, reason: str | None) -> None:
        if reason:
            self.gathered.skipped.append((_readable(name), reason))
        else:
            self.add(path, name)

    def _why_not(self, path: Path) -> str | None:
        if path.is_dir():
            ours = os.path.realpath(path) == self._storage or read_manifest(path) is not None or holds_configuration(path)
            return "a hidden folder" if path.name.startswith(".") else "made by raybooth" if ours else None
        if path.name.startswith("."):
            return "a hidden file"
        return None if path.suffix.lower() in SUFFIXES else f"'{path.suffix or path.name}' is not a picture's file type"

    def _photo(self, path: Path, name: str) -> None:
        if not path.exists():
            raise RayboothError(f"{_readable(name)} is a link to {path.readlink()}, which is not there: mend the link, or remove it.")
        if not path.is_file():
            raise RayboothError(f"{_readable(name)} is neither a file nor a folder: give pictures, or folders of them, with --photos.")
        self.gathered.photos.append(Photo(_readable(name), path))
        if len(self.gathered.photos) > MOST:
            raise RayboothError(f"There are more than {MOST} photographs ({_readable(name)} is one): give three to ten pictures of one subject with --photos.")


def _readable(name: str) -> str:
    """A file name as text: it may hold bytes that are not, which neither JSON nor a terminal takes."""
    return os.fsencode(name).decode(errors="replace")


def _made_besides(folder: Path) -> set[str]:
    """Names of a stage folder's outputs that are not its pictures, such as its contact sheet."""
    manifest = read_manifest(folder) or {"outputs": {}, "facts": {}}
    return set(manifest["outputs"]) - set(manifest["facts"].get("pictures", manifest["outputs"]))


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return f"{scheme}://{'***@' if '@' in host else ''}{host.rpartition('@')[2]}{rest[len(host) :]}"


def _address(url: str) -> str:
    """A URL as a request takes it: blanks and letters of any language encoded, the host's by the rules for domain names.

    Raises:
        ValueError: if it is not an address.
    """
    parts = urlsplit(url)
    host, colon, port = parts.netloc.partition(":")
    netloc = parts.netloc if parts.netloc.isascii() else f"{host.encode('idna').decode()}{colon}{port}"
    return quote(urlunsplit(parts._replace(netloc=netloc)), safe=string.punctuation)


def _read(response: http.client.HTTPResponse) -> bytes:
    """The body, up to one byte more than LARGEST_DOWNLOAD.

    Raises:
        TimeoutError: if that takes longer than LONGEST_DOWNLOAD: a server that sends a byte now and then never runs into a socket's timeout.
    """
    data, until = bytearray(), time.monotonic() + LONGEST_DOWNLOAD
    while len(data) <= LARGEST_DOWNLOAD and (part := response.read1(1 << 16)):
        data += part
        if time.monotonic() > until:
            raise TimeoutError(f"it takes longer than {LONGEST_DOWNLOAD:g} seconds")
    return bytes(data)


def _download(url: str) -> bytes:
    if _without_password(url) != url:
        raise RayboothError(f"{_without_password(url)} has a name and a password in its address, which raybooth does not send: download it, and give the file.")
    try:
        request = urllib.request.Request(_address(url), headers={"User-Agent": "raybooth"})
        with urllib.request.urlopen(request, timeout=30) as response:
            data = _read(response)
    except (http.client.HTTPException, OSError, ValueError, OverflowError) as error:  # the last of a port
        raise RayboothError(f"The photograph {url} cannot be fetched: {reason(getattr(error, 'reason', error))}. Check the address, or give a file.") from None
    if len(data) > LARGEST_DOWNLOAD:
        raise RayboothError(f"The photograph {url} is larger than {LARGEST_DOWNLOAD >> 20} MiB: give a smaller one.")
    return data
