"""Upload and run: photographs over HTTP become a storage under the served folder, and `raybooth run` goes to work on it."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from raybooth.errors import RayboothError
from raybooth.photos import Photo
from raybooth.serving import uploads
from raybooth.serving.errors import ApiError, ErrorAnswer
from raybooth.serving.progress import LOG, Progress, picture, progress
from raybooth.serving.queue import Queue
from raybooth.serving.subjects import ID

ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorAnswer} for code in (400, 401, 403, 404, 408, 409, 413, 429)}
MOST_UPLOADS = 4
"""At once: each may hold as many bytes in memory as one request may have."""


class Runs(BaseModel):
    """All runs that were started here."""

    runs: list[Progress]


@dataclass(frozen=True)
class Surroundings:
    """What a run that is started here has to know of the server.

    Attributes:
        base: the base model, as a section of the configuration.
        folder: where it lies now, if that is known.
        names: that other subjects have.
    """

    base: dict[str, Any]
    folder: Callable[[], Path | None] = lambda: None
    names: Callable[[], Container[str]] = tuple


def runs_router(root: Path, served: Surroundings, overrides: Iterable[str] = (), queue: Queue | None = None) -> APIRouter:
    """Runs of subjects on the base that is served, each in a folder of its own under `root`.

    Args:
        overrides: settings of every run, as the command line's --set takes them.
    """
    queue, root, overrides = queue or Queue(), root.expanduser().absolute(), list(overrides)
    uploading = asyncio.Semaphore(MOST_UPLOADS)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(queue.close)

    router = APIRouter(prefix="/api/runs", tags=["runs"], lifespan=lifespan, responses=ERRORS)

    def known(run: str) -> Path:
        storage = root / run
        with _there(storage):
            if not ID.fullmatch(run) or not (storage / LOG).exists():
                raise ApiError(404, f"There is no run {run} that was started here.", "not_found")
        return storage

    def told(storage: Path) -> Progress:
        with _explained(), _there(storage):
            return progress(storage, queue.state(storage))

    @router.post("", status_code=202, openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": uploads.FORM}}}})
    async def start(request: Request) -> Progress:
        """Learn a subject from photographs. It runs at once, or when those before it are done."""
        if queue.full:  # before the photographs have travelled
            raise _full()
        if uploading.locked():
            raise ApiError(429, "As many uploads as may are on their way: try again in a moment.", "too_many_uploads", retry_after=5)
        async with uploading:
            fields, photos = await uploads.read(request)
            return await run_in_threadpool(taken_in, fields, photos)

    def taken_in(fields: dict[str, str], photos: list[Photo]) -> Progress:
        name = fields.get("name", "")
        uploads.check_name(name, served.names())
        uploads.refuse_taken(root / name)
        with _explained():
            config = uploads.settings(root / name, served.base, fields, overrides)
            uploads.store(root / name, config, photos, served.folder())
        with _there(root / name):
            taken = queue.put(root / name)
        if not taken:  # others have the last place: the name stays free
            shutil.rmtree(root / name, ignore_errors=True)
            raise _full()
        return told(root / name)

    @router.get("")
    def every() -> Runs:
        """All runs that were started here, those with news first."""
        runs = []
        for storage in sorted((log.parent for log in root.glob(f"*/{LOG}")), key=_news, reverse=True):
            with contextlib.suppress(ApiError):  # one whose settings another version wrote, say; asked for by its name it says so
                runs.append(told(storage))
        return Runs(runs=runs)

    @router.get("/{run}")
    def one(run: str) -> Progress:
        """How far it has come."""
        return told(known(run))

    @router.get("/{run}/pictures/{file:path}", response_class=FileResponse, responses={200: {"content": {"image/png": {}}}})
    def shown(run: str, file: str) -> Response:
        """One of its pictures."""
        path = picture(known(run), file)
        if path is None:
            raise ApiError(404, f"The run {run} has no picture {file}.", "not_found")
        return FileResponse(path, media_type="image/png")

    @router.post("/{run}/resume", status_code=202)
    def resume(run: str) -> Progress:
        """Go on with one that was stopped or has failed, from what is complete."""
        storage = known(run)
        state = told(storage).state
        if state not in ("stopped", "failed"):
            raise ApiError(409, f"The run {run} is {state}: there is nothing to resume.", "not_stopped")
        with _there(storage):
            if not queue.put(storage):
                raise _full()
        return told(storage)

    @router.delete("/{run}", status_code=202)
    def stop(run: str) -> Progress:
        """Stop it, or take it out of the queue. What is complete is kept."""
        storage = known(run)
        queue.stop(storage)
        return told(storage)

    return router


def _full() -> ApiError:
    return ApiError(429, "As many runs wait as may: try again when one of them is done.", "queue_full", retry_after=60)


def _news(storage: Path) -> float:
    """When the run in it last said something; one that has just been removed is the oldest."""
    try:
        return (storage / LOG).stat().st_mtime
    except OSError:
        return 0.0


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RayboothError as error:
        raise ApiError(400, str(error), "invalid_value") from None


@contextlib.contextmanager
def _there(storage: Path) -> Iterator[None]:
    """Somebody may remove it at this moment, or have made its files unreadable."""
    try:
        yield
    except OSError:
        raise ApiError(404, f"There is no run {storage.name} any more that can be read.", "not_found") from None
