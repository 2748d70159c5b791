"""Upload and run: photographs over HTTP become a storage under the served folder, and `raybooth run` goes to work on it."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from raybooth.disk import is_locked
from raybooth.errors import RayboothError
from raybooth.photos import Photo
from raybooth.serving import uploads
from raybooth.serving.errors import ApiError, ErrorAnswer
from raybooth.serving.progress import RUN_LOG, Progress, marks, picture, progress
from raybooth.serving.queue import Queue
from raybooth.serving.subjects import ID
from raybooth.workspace import LOCK

ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorAnswer} for code in (400, 401, 403, 404, 408, 409, 413, 429)}
MOST_UPLOADS = 4
"""How many uploads may come at once: each may hold as many bytes in memory as one request may have."""


class Runs(BaseModel):
    """All runs that were started here."""

    runs: list[Progress]


@dataclass(frozen=True)
class ServerContext:
    """What a run that is started here has to know about the server.

    Attributes:
        base: the base model, as a section of the configuration.
        folder: where it lies now, if that is known.
        names: those that are taken.
    """

    base: dict[str, Any]
    folder: Callable[[], Path | None] = lambda: None
    names: Callable[[], Container[str]] = tuple


class RunManager:
    """The runs in folders of `root`, and the queue that works on them.

    Args:
        overrides: settings of every run, as the command line's --set takes them.
    """

    def __init__(self, root: Path, served: ServerContext, overrides: Iterable[str] = (), queue: Queue | None = None):
        self.root, self.served, self.overrides, self.queue = root.expanduser().absolute(), served, list(overrides), queue or Queue()
        self._over: dict[Path, tuple[dict[str, int], Progress]] = {}

    def known(self, run: str) -> Path:
        """The storage of a run that was started here."""
        storage = self.root / run
        with _there(storage):
            if not ID.fullmatch(run) or not (storage / RUN_LOG).exists():
                raise ApiError(404, f"There is no run {run} that was started here.", "not_found")
        return storage

    def told(self, storage: Path) -> Progress:
        """The progress of a run. That of one that is over is kept: the page asks every second for all that ever were."""
        with _explained(), _there(storage):
            state = self.queue.state(storage)
            if state or is_locked(storage / LOCK):
                return progress(storage, state)
            now, (before, known) = marks(storage), self._over.get(storage, ({}, None))
            if known is None or now != before:
                known = progress(storage)
                self._over[storage] = now, known
            return known

    def every(self) -> Iterator[Progress]:
        for storage in sorted((log.parent for log in self.root.glob(f"*/{RUN_LOG}")), key=_news, reverse=True):
            with contextlib.suppress(ApiError):  # such as one whose settings another version wrote; asked for by its name, it says so
                yield self.told(storage)

    def take_in(self, fields: dict[str, str], photos: list[Photo]) -> Progress:
        name = fields.get("name", "")
        storage = self.root / name
        uploads.check_name(name, self.served.names())
        uploads.refuse_taken(storage)
        with _explained():
            config = uploads.settings(storage, self.served.base, fields, self.overrides)
            uploads.store(storage, config, photos, self.served.folder())
        try:
            self._put(storage)
        except ApiError:  # others took the last place: the name stays free
            shutil.rmtree(storage, ignore_errors=True)
            raise
        return self.told(storage)

    def resume(self, run: str) -> Progress:
        storage = self.known(run)
        state = self.told(storage).state
        if state not in ("stopped", "failed"):
            raise ApiError(409, f"The run {run} is {state}: there is nothing to resume.", "not_stopped")
        self._put(storage)
        return self.told(storage)

    def stop(self, run: str) -> Progress:
        storage = self.known(run)
        self.queue.stop(storage)
        return self.told(storage)

    def _put(self, storage: Path) -> None:
        with _there(storage):
            if not self.queue.put(storage):
                raise _full()


def runs_router(manager: RunManager) -> APIRouter:
    """The routes under /api/runs: runs on the base that is served, each in a folder of its own."""
    uploading = asyncio.Semaphore(MOST_UPLOADS)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(manager.queue.close)

    router = APIRouter(prefix="/api/runs", tags=["runs"], lifespan=lifespan, responses=ERRORS)

    @router.post("", status_code=202, openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": uploads.FORM}}}})
    async def start(request: Request) -> Progress:
        """Learn a subject from photographs. It runs at once, or when those before it are done."""
        if manager.queue.full:  # before the photographs have travelled
            raise _full()
        if uploading.locked():
            raise ApiError(429, "As many uploads as may are on their way: try again in a moment.", "too_many_uploads", retry_after=5)
        async with uploading:
            fields, photos = await uploads.read(request)
            return await run_in_threadpool(manager.take_in, fields, photos)

    @router.get("")
    def every() -> Runs:
        """All runs that were started here, those with news first."""
        return Runs(runs=list(manager.every()))

    @router.get("/{run}")
    def one(run: str) -> Progress:
        """How far it has come."""
        return manager.told(manager.known(run))

    @router.get("/{run}/pictures/{file:path}", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    def shown(run: str, file: str) -> Response:
        """One of its pictures."""
        data = picture(manager.known(run), file)
        if data is None:
            raise ApiError(404, f"The run {run} has no picture {file}.", "not_found")
        return Response(data, media_type="image/png")

    @router.post("/{run}/resume", status_code=202)
    def resume(run: str) -> Progress:
        """Go on with one that was stopped or has failed, from what is complete."""
        return manager.resume(run)

    @router.delete("/{run}", status_code=202)
    def stop(run: str) -> Progress:
        """Stop it, or take it out of the queue. What is complete is kept."""
        return manager.stop(run)

    return router


def _full() -> ApiError:
    return ApiError(429, "As many runs wait as may: try again when one of them is done.", "queue_full", retry_after=60)


def _news(storage: Path) -> float:
    """When the run in it last said something; one that has just been removed is the oldest."""
    try:
        return (storage / RUN_LOG).stat().st_mtime
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
    """Answer 404 for a storage that somebody is just removing, or whose files cannot be read."""
    try:
        yield
    except OSError:
        raise ApiError(404, f"There is no run {storage.name} any more that can be read.", "not_found") from None
