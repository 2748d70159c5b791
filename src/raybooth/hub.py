"""Models and photographs from the Hugging Face hub: pinned, only what is needed, resumable, checked against its hashes.

HF_ENDPOINT, HF_TOKEN and the other variables of huggingface_hub are honoured.
"""

import contextlib
import errno
import glob
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from tqdm import tqdm

from raybooth.errors import RayboothError
from raybooth.families.folder import plain_name, settle_shards
from raybooth.files import file_digest, files_under
from raybooth.sources import HUB, MOST
from raybooth.tables import unpack

Choose = Callable[[list[str], Path], list[str]]
Check = Callable[[Path, list[str]], None]
CONVERTER, CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
"""The hub's bot and the title of its pull requests, by which transformers looks for them too."""

LARGEST_DATASET = 2 << 30
"""Most bytes of photographs that are fetched from the hub."""
OF_THE_DISK = (
    errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ESTALE,
)  # fmt: skip
"""Errors of this machine's disk, not of the hub."""


@dataclass(frozen=True)
class Repo:
    """A repository of the hub at a revision (default: its main branch), and the settings that name both, for messages."""

    name: str
    revision: str | None
    setting: str
    revision_setting: str
    kind: Literal["model", "dataset"] = "model"


def resolve(repo: Repo) -> str:
    """The commit that the repository's revision stands for."""
    return str(_info(repo).sha)


def resolve_with(file: str, repo: Repo) -> str:
    """The commit as by resolve(); if no revision is given and the main branch lacks `file`, the one in which the hub's safetensors converter proposes it."""
    info = _info(repo)
    if repo.revision or any(f.rfilename == file for f in info.siblings or []):
        return str(info.sha)
    with _explained(repo):
        return _converted(repo.name, str(info.sha)) or str(info.sha)


def _info(repo: Repo) -> Any:
    """What the hub knows of a repository, its files' sizes and hashes included."""
    from huggingface_hub import HfApi, constants

    with _explained(repo):
        try:
            info = HfApi().repo_info(repo.name, revision=repo.revision, repo_type=repo.kind, files_metadata=True)
        except (KeyError, TypeError, AttributeError, JSONDecodeError, UnicodeDecodeError):
            info = None
    if info is None or not info.sha:
        raise RayboothError(
            f"What answers at {constants.ENDPOINT} for the {repo.kind} {repo.name} is not the hub, but a proxy or a login page, perhaps: "
            "check the network and HF_ENDPOINT, and run the same command again."
        )
    return info


def _converted(repo: str, main: str) -> str | None:
    """The commit of the converter's open pull request on top of `main`. Only its own count, as in transformers: weights from anybody could be anything."""
    from huggingface_hub import HfApi

    api = HfApi()
    for proposed in api.get_repo_discussions(repo, author=CONVERTER, discussion_type="pull_request", discussion_status="open"):
        if (proposed.author, proposed.title) == (CONVERTER, CONVERSION):
            newest, *older = [commit.commit_id for commit in api.list_repo_commits(repo, revision=proposed.git_reference)]
            if older[:1] == [main]:
                return newest
    return None


def fetch_model(repo: Repo, target: Path, choose: Choose, check: Check = lambda folder, names: None) -> str | None:
    """Download the files that `choose(all names, folder with model_index.json)` names into `target`; after a stop it is resumed.

    `check(target, names)` may refuse the model when all but its weights are there.

    Returns:
        The licence that its card names.

    Raises:
        RayboothError: if the hub, the repository or the revision cannot be had, or a file's hash is not the hub's.
    """
    from huggingface_hub import hf_hub_download

    info = _info(repo)
    with _explained(repo):
        siblings = {f.rfilename: f for f in info.siblings or []}
        if "model_index.json" in siblings:
            hf_hub_download(repo.name, "model_index.json", revision=repo.revision, local_dir=target)
        names = choose(list(siblings), target)
        weights = [name for name in names if name.endswith(".safetensors")]
        for name in names:
            if name not in weights:
                _fetch(repo, name, siblings[name].lfs, target)
        check(target, names)
        for name in weights:
            _fetch(repo, name, siblings[name].lfs, target)
    _tidy(target, names)
    return info.card_data.get("license") if info.card_data else None


def _fetch(repo: Repo, name: str, lfs: Any, target: Path) -> None:
    """Download one file; the hub states size and hash of large ones."""
    from huggingface_hub import hf_hub_download, hf_hub_url

    if not lfs:
        hf_hub_download(repo.name, name, revision=repo.revision, local_dir=target)
    elif not any(_is(target / had, lfs.size, lfs.sha256) for had in (name, plain_name(name))):  # perhaps from an earlier try for another commit
        _fetch_large(hf_hub_url(repo.name, name, revision=repo.revision), target / name, lfs.size, lfs.sha256)


def _is(path: Path, size: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == size and file_digest(path) == sha256


def _fetch_large(url: str, path: Path, size: int, sha256: str) -> None:
    """Download a large file, from where an earlier try was cut off: huggingface_hub's own download starts such a file anew."""
    part = path.with_name(f"{path.name}.{sha256[:16]}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    with tqdm(total=size, initial=have, desc=path.name, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        if have < size:
            _append(url, part, have, bar.update)
    if part.stat().st_size < size:
        raise RayboothError(f"{path.name} ended early on its way from {url}: run the same command again, it goes on from there.")
    if not _is(part, size, sha256):
        part.unlink()
        raise RayboothError(
            f"{path.name} arrived from {url} with another hash than the hub states: it was deleted, run the same command again to fetch it anew."
        )
    part.rename(path)


def _append(url: str, part: Path, have: int, arrived: Callable[[int], object]) -> None:
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers() | ({"Range": f"bytes={have}-"} if have else {})
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        with part.open("ab" if answer.status_code == 206 else "wb") as f:
            for chunk in answer.iter_bytes():  # as they come: what is in a buffer is lost with the connection
                f.write(chunk)
                arrived(len(chunk))


def _tidy(target: Path, names: list[str]) -> None:
    """Give the files their plain names and delete all else: huggingface_hub's notes, and what an earlier try for another commit left."""
    shutil.rmtree(target / ".cache", ignore_errors=True)
    for other in set(files_under(target)) - {had for name in names for had in (name, plain_name(name))}:
        (target / other).unlink()
    for name in names:
        if (target / name).exists():  # if not, it has its plain name already, from before a stop
            (target / name).rename(target / plain_name(name))
    settle_shards(target, map(plain_name, names))


def fetch_dataset(spec: str, target: Path, suffixes: frozenset[str]) -> Path:
    """Fetch the pictures of a dataset repository, "owner/name" or "owner/name@revision", into `target`, which is returned: its files with these suffixes, or
    if there are none, the pictures in its parquet tables. Every other file is an empty one there, to show that it was passed over.

    Raises:
        RayboothError: if they are far too many for photographs of one subject.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = spec.removeprefix("datasets/").partition("@")
    asked = Repo(name, revision or None, "subject.photos", "subject.photos", "dataset")
    info = _info(asked)
    repo, sizes = replace(asked, revision=str(info.sha)), {f.rfilename: f.size or 0 for f in info.siblings or []}
    pictures = [n for n in sizes if Path(n).suffix.lower() in suffixes]
    tables = [n for n in sizes if n.endswith(".parquet")] if not pictures else []
    wanted = pictures or tables
    _check_few(repo.name, len(pictures), sum(sizes[n] for n in wanted))
    with _explained(repo):
        if wanted:
            patterns = [glob.escape(n) for n in wanted]
            snapshot_download(repo.name, repo_type="dataset", revision=repo.revision, local_dir=target, allow_patterns=patterns)
    shutil.rmtree(target / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
    for other in sizes.keys() - wanted:
        (target / other).parent.mkdir(parents=True, exist_ok=True)
        (target / other).touch()
    for table in tables:
        unpack(target / table, f"{HUB}{repo.name}/{table}", suffixes, most=MOST + 1)
    return target


def _check_few(name: str, pictures: int, size: int) -> None:
    """Refuse too many pictures, or too large ones, before they are fetched."""
    if pictures > MOST or size > LARGEST_DATASET:
        raise RayboothError(
            f"{HUB}{name} holds {pictures or 'tables of'} pictures, {size / 1e9:.1f} GB: this is no dataset of one subject's photographs, of which three to "
            "ten do. Download those that you want, and give the files."
        )


def check_may_write() -> None:
    """Check that there is a token for the hub; whether it may write there shows at the push.

    Raises:
        RayboothError: if there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise RayboothError("Pushing to the hub needs a token that may write: set HF_TOKEN, or run 'hf auth login'.")


def push(repo: str, folder: Path) -> str:
    """Push `folder` as the model repository `repo`, made private if it is new. Returns its address.

    Raises:
        RayboothError: if the hub cannot be reached or does not let the token's owner write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with _explained(Repo(repo, None, "--repo", "--repo")):
        try:
            address = HfApi().create_repo(repo, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="raybooth export")
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise RayboothError(f"The hub does not let this token write to {repo}: check the name, and that HF_TOKEN may write there.") from None
    return str(address)


@contextlib.contextmanager
def _explained(repo: Repo) -> Iterator[None]:
    """Report huggingface_hub's errors in a sentence each."""
    from huggingface_hub import constants, errors

    hub, it = constants.ENDPOINT, f"{repo.kind} {repo.name}"
    prefix = "datasets/" if repo.kind == "dataset" else ""
    transport: type[Exception] = errors.HfHubHTTPError.__mro__[1]  # the base error of its HTTP library, whichever that is
    try:
        yield
    except errors.RevisionNotFoundError:
        raise RayboothError(f"The {it} has no revision '{repo.revision}' on {hub}: check {repo.revision_setting}.") from None
    except errors.GatedRepoError:
        raise RayboothError(f"The {it} asks for its licence to be accepted: do so at {hub}/{prefix}{repo.name} and set HF_TOKEN.") from None
    except errors.RepositoryNotFoundError:
        raise RayboothError(f"There is no {it} on {hub}, or it is private: check {repo.setting}, or set HF_TOKEN.") from None
    except errors.HFValidationError:
        form = "hf://owner/name" if repo.kind == "dataset" else "owner/name"
        raise RayboothError(f"'{repo.name}' is neither a folder nor a name on the hub: write {repo.setting} as {form}.") from None
    except UnicodeEncodeError as error:
        if not error.object.startswith("Bearer "):
            raise
        raise RayboothError("The token for the hub holds a letter that no token has: copy it once more into HF_TOKEN, or unset it.") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, transport, OSError) as error:
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            raise
        raise RayboothError(_sentence(error, repo, constants.ENDPOINT)) from None


def _sentence(error: Exception, repo: Repo, hub: str) -> str:
    """The sentence for an error, by the status of the hub's answer, if it has answered; the error with the answer may be this one's cause."""
    it, reason = f"{repo.kind} {repo.name}", str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    answer = next((e.response for e in (error, error.__cause__) if getattr(e, "response", None) is not None), None)  # type: ignore[union-attr]
    match getattr(answer, "status_code", None):
        case 401 | 403:
            return (
                f"The hub {hub} does not give out the {it} ({reason}): check that HF_TOKEN is a valid token that may read it, or unset it, "
                "and run the same command again."
            )
        case 404 | 410 as status:
            file = unquote(str(getattr(answer, "url", "")).partition("/resolve/")[2].partition("/")[2])
            what = f"{file} of the {it}" if file else f"the {it}"
            return f"The hub {hub} no longer has {what} (status {status}): ask its owner, or check {repo.setting}."
        case 429:
            return f"The hub {hub} is asked too often and refuses the {it} for a while (status 429): wait some minutes and run the same command again."
        case _:
            needs_none = "; '--base mini' needs no download" if repo.setting == "base.model" else ""
            return (
                f"The hub {hub} cannot be reached for the {it} ({reason}): check the network and run the same command again, "
                f"or name a local folder as {repo.setting} instead{needs_none}."
            )
