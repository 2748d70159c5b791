"""Subjects over HTTP, in the shape of OpenAI's images API. Knows nothing of Ray: what draws is given to it."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.requests import ClientDisconnect

from raybooth import __version__
from raybooth.serving import errors
from raybooth.serving.errors import ApiError, ErrorAnswer
from raybooth.serving.generations import ClientGoneError, Draw, RequestQueue, job_of
from raybooth.serving.guard import Guard
from raybooth.serving.metrics import Measured, Metrics
from raybooth.serving.schemas import DEFAULTS, Health, ImageAnswer, ImageRequest, Limits, Model, Models, bounded
from raybooth.serving.static import Files
from raybooth.serving.subjects import Subject, Subjects

Healthy = Callable[[], Awaitable[bool]]


async def _always() -> bool:
    return True


def create_app(
    subjects: Subjects, draw: Draw, limits: Limits = DEFAULTS, keys: Sequence[str] = (), hosts: frozenset[str] | None = None,
    healthy: Healthy = _always, routers: Sequence[APIRouter] = (), page: Path | None = None,
) -> FastAPI:  # fmt: skip
    """The application.

    Args:
        subjects: what can be drawn, looked at anew with every request.
        draw: draws a job's pictures, and yields them as they are ready.
        keys: API keys; if there are any, /v1, /api and /metrics need one of them.
        hosts: names under which it may be asked; None: any.
        healthy: whether something is there that draws.
        routers: further routes.
        page: a folder that is shown at /.
    """
    # /docs without a CDN: the machines that draw are often not on the internet.
    app = FastAPIOffline(title="raybooth", version=__version__, description="Pictures of subjects, by models that raybooth has fine-tuned.", redoc_url=None)
    metrics = Metrics()
    errors.install(app)
    app.add_exception_handler(ClientGoneError, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.include_router(_models(subjects, metrics), prefix="/v1", responses=_errors(400, 401, 404))
    app.include_router(_generations(subjects, RequestQueue(draw, limits, metrics), limits))
    app.include_router(_house(metrics, healthy))
    for router in routers:
        app.include_router(router)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    if page:
        app.mount("/", Files(page), name="page")
    app.add_middleware(Guard, keys=keys, hosts=hosts, limits=limits)
    app.add_middleware(Measured, metrics=metrics)
    return app


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorAnswer} for code in codes}


def _models(subjects: Subjects, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["models"])

    async def one(name: str) -> Subject:
        found = await anyio.to_thread.run_sync(subjects.found)
        if name not in found:
            raise ApiError(404, f"The model '{name}' does not exist.", "model_not_found", "model")
        return found[name]

    @router.get("/models")
    async def list_models() -> Models:
        """All subjects, and the base model."""
        found = await anyio.to_thread.run_sync(subjects.found)
        metrics.models.set(len(found))
        return Models(data=[_described_model(s) for s in found.values()])

    @router.get("/models/{model}")
    async def retrieve_model(model: str) -> Model:
        """One of them."""
        return _described_model(await one(model))

    @router.get("/models/{model}/photographs/{number}", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def photograph(model: str, number: int) -> Response:
        """A picture that the model has learnt the subject from."""
        photographs = (await one(model)).photographs
        try:
            path = dict(enumerate(photographs))[number]  # in a list, -1 would be the last
            return Response(await anyio.to_thread.run_sync(path.read_bytes), media_type="image/png")
        except (KeyError, OSError):  # gone, or being written anew
            raise ApiError(404, f"The model '{model}' has no photograph {number}.", "not_found", "number") from None

    return router


def _described_model(s: Subject) -> Model:
    return Model(
        id=s.id, created=s.created, class_=s.class_name, token=s.token, prompt=s.prompt, kind=s.kind,
        size=f"{s.sampling.resolution}x{s.sampling.resolution}",
        photographs=[f"/v1/models/{s.id}/photographs/{i}?made={s.created}" for i in range(len(s.photographs))],
    )  # fmt: skip


def _generations(subjects: Subjects, requests: RequestQueue, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["images"])
    Asked = bounded(limits)  # noqa: N806
    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @router.post(
        "/v1/images/generations", response_model=ImageAnswer, response_model_exclude_none=True,
        responses={**_errors(400, 401, 403, 404, 408, 413, 429, 503), **streamed},
    )  # fmt: skip
    async def generate(request: Request, body: Asked) -> Any:  # type: ignore[valid-type]
        """Draw. With `stream`, pictures in progress and complete ones are sent as events."""
        asked: ImageRequest = body
        job = job_of(asked, await anyio.to_thread.run_sync(subjects.found))
        if not asked.stream:
            return await requests.answer(job, request, asked, lambda name: str(request.url_for("picture", name=name)))
        pictures = requests.drawn(job, request)
        first = await anext(pictures, None)  # an error before it is still an answer of its own
        return StreamingResponse(
            _closed_after(requests.events(first, pictures, job), pictures), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    @router.get("/pictures/{name}.png", name="picture", response_class=Response, responses={200: {"content": {"image/png": {}}}, **_errors(400, 404)})
    async def picture(name: str) -> Response:
        """A picture that was asked for as a URL, for some minutes."""
        data = requests.kept.get(name)
        if data is None:
            raise ApiError(404, "There is no such picture, or not any more.", "not_found")
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=600"})

    return router


async def _closed_after(events: AsyncIterator[bytes], pictures: AsyncGenerator[Any, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(pictures):
        async for event in events:
            yield event


def _house(metrics: Metrics, healthy: Healthy) -> APIRouter:
    router = APIRouter(tags=["server"])

    @router.get("/healthz", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether pictures can be drawn now."""
        if await healthy():
            return Health(status="ok")
        response.status_code = 503
        return Health(status="starting")

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_errors(401)})
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    return router


def _described(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, without the 422 that it takes for granted: what is wrong is answered with 400."""
    if app.openapi_schema is None:
        from fastapi.openapi.utils import get_openapi

        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = made
    return app.openapi_schema
