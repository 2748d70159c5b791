"""POST /v1/images/generations: from a request to a job, and from what is drawn to an answer or a stream of events."""

import asyncio
import base64
import contextlib
import json
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from raybooth.errors import NotFiniteError, RayboothError
from raybooth.serving.batcher import Drawn, Job
from raybooth.serving.engine import Row
from raybooth.serving.errors import ApiError
from raybooth.serving.kept import Kept
from raybooth.serving.metrics import Metrics
from raybooth.serving.schemas import MAX_SEED, ImageAnswer, ImageRequest, Limits, Picture, event
from raybooth.serving.subjects import BASE, Subject

Drawing = AsyncGenerator[Drawn, None]
Draw = Callable[[Job], Drawing]
"""Draws what a job wants. Raises RayboothError if it cannot be drawn, UnavailableError if nobody can draw it now."""
log = logging.getLogger("raybooth.serving")


class UnavailableError(Exception):
    """Nobody can draw it now; later perhaps."""


class ClientGoneError(Exception):
    """The client has left."""


class Pace:
    """The recent mean of the seconds between pictures, over the times when some were waited for."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque([0.5], maxlen=64)  # more than a batch, whose pictures come together
        self._last = 0.0

    def begin(self) -> None:
        """Note that somebody waits again, after nobody did."""
        self._last = time.monotonic()

    def note(self) -> None:
        """Note that a picture is done."""
        now = time.monotonic()
        self._gaps.append(now - self._last)
        self._last = now

    @property
    def seconds(self) -> float:
        return sum(self._gaps) / len(self._gaps)


@dataclass
class RequestQueue:
    """Takes in requests, up to the queue's length, and makes sure that each ends in time.

    Attributes:
        pending: pictures that are waited for.
        pace: of the pictures, for Retry-After.
    """

    draw: Draw
    limits: Limits
    metrics: Metrics
    kept: Kept = field(init=False)
    pending: int = 0
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self.kept = Kept(self.limits)

    @property
    def retry_after(self) -> int:
        """Seconds until half of what is waited for is drawn."""
        return max(1, min(60, math.ceil(self.pending * self.pace.seconds / 2)))

    async def drawn(self, job: Job, request: Request) -> Drawing:
        """The job's pictures.

        Raises:
            ApiError: with the status to answer: if too many are waited for, it takes too long, one is kept back, or something breaks.
            ClientGoneError: if the client has left.
        """
        n = len(job.rows)
        if self.pending + n > self.limits.queue:
            raise ApiError(429, f"{self.pending} pictures are waited for already: try again in a moment.", "queue_full", retry_after=self.retry_after)
        if not self.pending:
            self.pace.begin()
        self._add(n)
        done = 0
        try:
            async with contextlib.aclosing(_while_there(self.draw(job), request, self.limits.seconds)) as pictures:
                async for picture in pictures:
                    if picture.png is None:
                        raise ApiError(400, "A picture was kept back by the safety checker: try another seed or prompt.", "moderation_blocked")
                    if picture.partial is None:
                        done += 1
                        self._add(-1)
                        self.pace.note()
                        self.metrics.pictures.labels(job.rows[picture.row].subject.id).inc()
                        self.metrics.batch.observe(picture.batch)
                    yield picture
        except TimeoutError:
            problem = ApiError(503, f"It took longer than {self.limits.seconds:g} s: try again later.", "timeout", retry_after=self.retry_after)
            raise problem from None
        except UnavailableError as error:
            raise ApiError(503, f"{error}", "unavailable", retry_after=self.retry_after) from error
        except NotFiniteError as error:  # trying again would be of no use
            raise ApiError(400, f"{error}", "not_finite", param="model") from error
        except RayboothError as error:
            raise ApiError(503, f"{error}", "model_unavailable", param="model", retry_after=self.retry_after) from error
        except (ApiError, ClientGoneError):
            raise
        except Exception as error:
            log.exception("a batch failed")
            raise ApiError(503, "Drawing failed, and the log says why: try again later.", "failed", retry_after=self.retry_after) from error
        finally:
            self._add(done - n)

    def _add(self, n: int) -> None:
        self.pending += n
        self.metrics.waiting.set(self.pending)

    async def answer(self, job: Job, request: Request, asked: ImageRequest, url: Callable[[str], str]) -> ImageAnswer:
        """The answer with all pictures at once."""
        data: dict[int, Picture] = {}
        async with contextlib.aclosing(self.drawn(job, request)) as pictures:
            async for drawn in pictures:
                assert drawn.png is not None
                seed = job.rows[drawn.row].seed
                if asked.response_format == "url":
                    data[drawn.row] = Picture(url=url(self.kept.put(drawn.png)), seed=seed)
                else:
                    data[drawn.row] = Picture(b64_json=base64.b64encode(drawn.png).decode(), seed=seed)
        return ImageAnswer(created=int(time.time()), data=[data[i] for i in sorted(data)], size=_size(job))

    async def events(self, first: Drawn | None, pictures: Drawing, job: Job) -> AsyncIterator[bytes]:
        """Server-sent events, one for each picture in progress and each that is complete. An error can by now only be the last event."""
        created = int(time.time())
        try:
            while first is not None:
                assert first.png is not None
                partial = {"partial_image_index": first.partial} if first.partial is not None else {"seed": job.rows[first.row].seed}
                kind = "completed" if first.partial is None else "partial_image"
                yield _sse(kind, event(kind, first.row, base64.b64encode(first.png).decode(), _size(job), created, **partial))
                first = await anext(pictures, None)
        except ApiError as problem:
            yield f"event: error\ndata: {json.dumps({'type': 'error', **problem.body})}\n\n".encode()
        except ClientGoneError:
            pass


def _sse(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: image_generation.{kind}\ndata: {json.dumps(data)}\n\n".encode()


def _size(job: Job) -> str:
    return f"{job.sampling.resolution}x{job.sampling.resolution}"


def job_of(asked: ImageRequest, subjects: Mapping[str, Subject]) -> Job:
    """The job that a request asks for.

    Raises:
        ApiError: if there is no such model, or it cannot draw that.
    """
    subject = _chosen(asked.model, subjects)
    own = f"{subject.sampling.resolution}x{subject.sampling.resolution}"
    if asked.size not in (None, "auto", own):
        raise ApiError(400, f"Invalid size '{asked.size}': the model '{subject.id}' draws pictures of {own}; use that or auto.", "invalid_value", "size")
    try:
        prompt = subject.fill(asked.prompt)
    except RayboothError as error:
        raise ApiError(400, str(error), "invalid_value", "prompt") from None
    n = asked.n or 1
    seed = asked.seed if asked.seed is not None else secrets.randbelow(2**32)
    rows = tuple(Row(subject, prompt, (seed + k) % (MAX_SEED + 1)) for k in range(n))
    partials = (asked.partial_images or 0) if asked.stream else 0
    return Job(rows, subject.sampling.changed(asked.steps, asked.guidance), partials, asked.metadata is not False)


def _chosen(name: str | None, subjects: Mapping[str, Subject]) -> Subject:
    if name is None:
        own = [s for s in subjects.values() if s.id != BASE] or list(subjects.values())
        if len(own) != 1:
            raise ApiError(400, "Missing required parameter: 'model': GET /v1/models lists them.", "missing_required_parameter", "model")
        return own[0]
    if name not in subjects:
        raise ApiError(404, f"The model '{name}' does not exist: GET /v1/models lists those that do.", "model_not_found", "model")
    return subjects[name]


async def _while_there(pictures: Drawing, request: Request, seconds: float) -> Drawing:
    """`pictures`, until the client leaves or the time is up. No asyncio.timeout: a stream begins in one task and goes on in another."""
    loop = asyncio.get_running_loop()
    left, until = asyncio.create_task(_left(request)), loop.time() + seconds
    try:
        while True:
            coming = asyncio.ensure_future(anext(pictures, None))
            try:
                await asyncio.wait({coming, left}, timeout=until - loop.time(), return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise ClientGoneError if left.done() else TimeoutError
            finally:
                await _ended(coming)
            picture = coming.result()
            if picture is None:
                return
            yield picture
    finally:
        await _ended(left)
        await pictures.aclose()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _ended(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
