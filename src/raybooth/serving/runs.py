"""Upload and run: photographs over HTTP become a storage under the served folder, and `raybooth run` goes to work on it.

POST   /api/runs                 multipart: photos (1 to 50), name, class, and a token if the default is not wanted -> 202
GET    /api/runs                 all that were started here, the newest first
GET    /api/runs/ID              state, stages, step, losses, pictures
GET    /api/runs/ID/pictures/... one of those pictures
POST   /api/runs/ID/resume       what was stopped or failed goes on -> 202
DELETE /api/runs/ID              stops it; what is complete is kept -> 202

Refusals are {"error": {"message": one sentence}}.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from raybooth.errors import RayboothError
from raybooth.serving import uploads
from raybooth.serving.progress import LOG, picture, progress
from raybooth.serving.queue import Queue
from raybooth.serving.uploads import Refused


FULL = Refused(429, "As many runs wait as may: try again when one of them is done.", {"Retry-After": "60"})


class _Explained(APIRoute):
    """Refusals as the API's errors."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def explained(request: Request) -> Response:
            try:
                return await handler(request)
            except RayboothError as error:
                refused = Refused(422, str(error))
            except Refused as error:
                refused = error
            return JSONResponse({"error": {"message": str(refused), "type": "invalid_request_error"}}, refused.status, refused.headers)

        return explained


def refuse_other_sites(request: Request) -> None:
    """A form on somebody's web page may post to a server on loopback; browsers say from where."""
    if request.method != "GET" and request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused(403, "Runs are not started from other sites' pages.")


def runs_router(root: Path, base: str, overrides: Iterable[str] = (), queue: Queue | None = None) -> APIRouter:
    """Runs of subjects on `base`, each in a folder of its own under `root`.

    Args:
        overrides: settings of every run, as the command line's --set takes them.
    """
    queue, root, overrides = queue or Queue(), root.expanduser().absolute(), list(overrides)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(queue.close)

    router = APIRouter(prefix="/api/runs", route_class=_Explained, lifespan=lifespan, dependencies=[Depends(refuse_other_sites)])

    def known(name: str) -> Path:
        storage = root / name
        if not uploads.NAME.fullmatch(name) or not (storage / LOG).exists():
            raise Refused(404, f"There is no run {name} that was started here.")
        return storage

    def told(storage: Path) -> dict[str, Any]:
        return progress(storage, queue.state(storage))

    def begun(storage: Path) -> JSONResponse:
        if not queue.put(storage):
            raise FULL
        return JSONResponse(told(storage), 202)

    @router.post("")
    async def start(request: Request) -> Response:
        if queue.full:  # before the photographs have travelled
            raise FULL
        fields, photos = await uploads.read(request)
        name = fields.get("name", "")
        uploads.check_name(name)
        storage = root / name
        if storage.exists():
            raise Refused(409, f"There is a subject {name} already: choose another name.")
        config = uploads.settings(storage, base, fields, overrides)
        await run_in_threadpool(uploads.store, storage, config, photos)
        return begun(storage)

    @router.get("")
    def every() -> dict[str, Any]:
        runs = []
        for storage in sorted((log.parent for log in root.glob(f"*/{LOG}")), key=lambda s: (s / LOG).stat().st_mtime, reverse=True):
            with contextlib.suppress(RayboothError):  # one whose settings another version wrote; asked for by its name it says so
                runs.append(told(storage))
        return {"runs": runs}

    @router.get("/{name}")
    def one(name: str) -> dict[str, Any]:
        return told(known(name))

    @router.get("/{name}/pictures/{file:path}")
    def shown(name: str, file: str) -> Response:
        path = picture(known(name), file)
        if path is None:
            raise Refused(404, f"The run {name} has no picture {file}.")
        return FileResponse(path, media_type="image/png")

    @router.post("/{name}/resume")
    def resume(name: str) -> Response:
        storage = known(name)
        state = told(storage)["state"]
        if state not in ("stopped", "failed"):
            raise Refused(409, f"The run {name} is {state}: there is nothing to resume.")
        return begun(storage)

    @router.delete("/{name}")
    def stop(name: str) -> Response:
        storage = known(name)
        queue.stop(storage)
        return JSONResponse(told(storage), 202)

    return router
