"""What the tests of the API share: an app that draws nothing, on a socket or without one."""

import asyncio
import base64
import contextlib
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn
from fastapi import FastAPI
from PIL import Image
from test_runs import MINI, SETTINGS

from raybooth.serving.api import create_app
from raybooth.serving.batcher import Drawn, Job
from raybooth.serving.generations import Draw
from raybooth.serving.queue import Queue
from raybooth.serving.runs import RunManager, runs_router
from raybooth.serving.subjects import Subjects

GENERATIONS = "/v1/images/generations"
ASKED = {"prompt": "photo of {subject}", "model": "rex", "seed": 1}


@contextlib.asynccontextmanager
async def client(app: FastAPI, **how: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://127.0.0.1", timeout=60, **how) as made:
        yield made


@contextlib.contextmanager
def live(app: FastAPI) -> Iterator[str]:
    """The app on loopback; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def quick(wait: float = 0.0) -> Draw:
    """Draws nothing, at once or slowly."""

    async def draw(job: Job) -> AsyncGenerator[Drawn, None]:
        buffer = BytesIO()
        Image.new("RGB", (32, 32)).save(buffer, "PNG")
        for i in range(len(job.rows)):
            await asyncio.sleep(wait)
            yield Drawn(i, buffer.getvalue())

    return draw


def picture(b64: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(b64)))


def app_with_runs(subjects: Subjects, kennel: Path) -> FastAPI:
    """Its runs end at once."""
    ending = Queue(lambda storage: [sys.executable, "-c", ""])
    return create_app(subjects, quick(), routers=[runs_router(RunManager(kennel, MINI, SETTINGS, ending))])


def sent(method: str, path: str, kind: str, length: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    return head.encode("latin-1", "replace") + body
