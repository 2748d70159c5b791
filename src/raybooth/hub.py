"""Models and photographs from the Hugging Face hub: pinned, only what is needed, resumable, checked against its hashes.

HF_ENDPOINT, HF_TOKEN and the other variables of huggingface_hub are honoured.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from raybooth.errors import RayboothError
from raybooth.families.folder import plain_name, settle_shards
from raybooth.workspace import file_digest

Choose = Callable[[list[str], Path], list[str]]
Check = Callable[[Path], None]
CONVERTER, CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
"""The hub's bot, and what it calls its pull requests, as transformers looks for them."""


def resolve(repo: str, revision: str | None) -> str:
    """The commit that `revision` (default: the main branch) stands for."""
    from huggingface_hub import HfApi

    with _explained(repo, revision):
        return str(HfApi().model_info(repo, revision=revision).sha)


def resolve_with(file: str, repo: str, revision: str | None) -> str:
    """As resolve(); where the main branch, asked for by no name, has no `file`, the commit in which the hub's converter to safetensors proposes it."""
    from huggingface_hub import HfApi

    with _explained(repo, revision):
        info = HfApi().model_info(repo, revision=revision)
        has_it = any(f.rfilename == file for f in info.siblings or [])
        return str(info.sha if revision or has_it else _converted(repo, str(info.sha)) or info.sha)


def _converted(repo: str, main: str) -> str | None:
    """The converter's open pull request on top of the commit `main`. Only its own, as transformers has it: weights of anybody's could be anything."""
    from huggingface_hub import HfApi

    api = HfApi()
    for proposed in api.get_repo_discussions(repo, author=CONVERTER, discussion_type="pull_request", discussion_status="open"):
        if (proposed.author, proposed.title) == (CONVERTER, CONVERSION):
            newest, *older = [commit.commit_id for commit in api.list_repo_commits(repo, revision=proposed.git_reference)]
            if older[:1] == [main]:
                return newest
    return None


def fetch_model(repo: str, revision: str, target: Path, choose: Choose, check: Check = lambda folder: None) -> str | None:
    """Download the files that `choose(all names, folder with model_index.json)` names into `target`; a stop is gone on from.

    `check(target)` may refuse the model when all but its large files have come.

    Returns:
        The licence that its card names.

    Raises:
        RayboothError: if the hub, the repository or the revision cannot be had, or a file's hash is not the hub's.
    """
    from huggingface_hub import HfApi, hf_hub_download, hf_hub_url

    with _explained(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        siblings = {f.rfilename: f for f in info.siblings or []}
        if "model_index.json" in siblings:
            hf_hub_download(repo, "model_index.json", revision=revision, local_dir=target)
        names = choose(list(siblings), target)
        large = {name: lfs for name in names if (lfs := siblings[name].lfs)}
        for name in names:
            if name not in large:
                hf_hub_download(repo, name, revision=revision, local_dir=target)
        check(target)
        for name, lfs in large.items():
            if not (target / name).exists():
                _fetch_weights(hf_hub_url(repo, name, revision=revision), target / name, lfs.size, lfs.sha256)
    _tidy(target, names)
    return info.card_data.get("license") if info.card_data else None


def _fetch_weights(url: str, path: Path, size: int, sha256: str) -> None:
    """A large file, from where an earlier try was cut off: huggingface_hub's own download starts such a file anew."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    with tqdm(total=size, initial=have, desc=path.name, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        if have < size:
            _append(url, part, have, bar.update)
    if part.stat().st_size != size or file_digest(part) != sha256:
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
            for chunk in answer.iter_bytes():  # as they come: what waits in a buffer is lost with the connection
                f.write(chunk)
                arrived(len(chunk))


def _tidy(target: Path, names: list[str]) -> None:
    shutil.rmtree(target / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
    for name in names:
        (target / name).rename(target / plain_name(name))
    settle_shards(target, map(plain_name, names))


def fetch_dataset(spec: str, target: Path, suffixes: frozenset[str]) -> Path:
    """The pictures of a dataset repository, "owner/name" or "owner/name@revision"."""
    from huggingface_hub import snapshot_download

    repo, _, revision = spec.removeprefix("datasets/").partition("@")
    with _explained(repo, revision or None, kind="dataset"):
        patterns = [f"*{s}" for s in suffixes] + [f"*{s.upper()}" for s in suffixes]
        snapshot_download(repo, repo_type="dataset", revision=revision or None, local_dir=target, allow_patterns=patterns)
    shutil.rmtree(target / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
    return target


def check_may_write() -> None:
    """
    Raises:
        RayboothError: if there is no token to write to the hub with.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise RayboothError("Pushing to the hub needs a token that may write: set HF_TOKEN, or run 'hf auth login'.")


def push(repo: str, folder: Path) -> str:
    """`folder` as the model repository `repo`, made private if it is new. Returns its address.

    Raises:
        RayboothError: if the hub cannot be reached or does not let the token's owner write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with _explained(repo, None):
        try:
            address = HfApi().create_repo(repo, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="raybooth export")
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise RayboothError(f"The hub does not let this token write to {repo}: check the name, and that HF_TOKEN may write there.") from None
    return str(address)


@contextlib.contextmanager
def _explained(repo: str, revision: str | None, kind: str = "model") -> Iterator[None]:
    """huggingface_hub's errors in a sentence each."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    transport: type[Exception] = errors.HfHubHTTPError.__mro__[1]  # the base error of its HTTP library, whichever that is
    try:
        yield
    except errors.RevisionNotFoundError:
        raise RayboothError(f"The {kind} {repo} has no revision '{revision}' on {hub}: check base.revision.") from None
    except errors.GatedRepoError:
        raise RayboothError(f"The {kind} {repo} asks for its licence to be accepted: do so at {hub}/{repo} and set HF_TOKEN.") from None
    except errors.RepositoryNotFoundError:
        raise RayboothError(f"There is no {kind} {repo} on {hub}, or it is private: check the name, or set HF_TOKEN.") from None
    except errors.HFValidationError:
        raise RayboothError(
            f"'{repo}' is neither a folder nor a name on the hub (owner/name): give a diffusers folder, owner/name, or 'mini' with --base."
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, transport, OSError) as error:
        if isinstance(error, OSError) and error.errno in (13, 28, 30):  # the disk's, not the hub's
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RayboothError(
            f"The hub {hub} cannot be reached for the {kind} {repo} ({reason}): check the network and run the same command again, "
            "or name a local folder instead; '--base mini' needs no download."
        ) from None
