"""Stands in for the images API in tests of the page: coloured squares, streamed, for every subject under a folder."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

from raybooth.config import load
from raybooth.photos import png
from raybooth.workspace import digest, read_manifest

CSP = "default-src 'self'; img-src 'self' data: blob:"
PAGE = Path(__file__).parents[1] / "src" / "raybooth" / "serving" / "page"


def images_app(root: Path, runs: APIRouter, key: str | None = None) -> FastAPI:
    """`app.state`: `asked`, the requests for pictures; `busy`, how many of the next are refused; `slow`, seconds a partial picture."""
    app = FastAPI()
    app.state.asked, app.state.busy, app.state.slow = [], 0, 0.0

    @app.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Response:
        private = request.url.path.startswith(("/v1/", "/api/"))
        if private and key and request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": {"message": "The key is missing or wrong."}}, 401)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CSP
        return response

    def photographs(name: str) -> list[Path]:
        return sorted((root / name / "photographs").glob("*"))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        data: list[dict[str, Any]] = [{"id": "base", "class": "", "token": "", "prompt": "photo of a dog", "kind": "base", "photographs": []}]
        for folder in sorted(root.iterdir()):
            if read_manifest(folder / "fine-tuned-model"):
                subject = load(folder / "config.json").subject
                urls = [f"/v1/models/{folder.name}/photographs/{i}" for i in range(len(photographs(folder.name)))]
                about = {"class": subject.class_name, "token": subject.token, "prompt": subject.prompt, "kind": "adapters", "photographs": urls}
                data.append({"id": folder.name, **about})
        return {"object": "list", "data": [{"object": "model", "created": i, "owned_by": "raybooth", **m} for i, m in enumerate(data)]}

    @app.get("/v1/models/{name}/photographs/{i}")
    def photograph(name: str, i: int) -> Response:
        return FileResponse(photographs(name)[i])

    @app.post("/v1/images/generations")
    async def draw(request: Request) -> Response:
        asked = await request.json()
        if app.state.busy:
            app.state.busy -= 1
            return JSONResponse({"error": {"message": "Too many requests."}}, 429, {"Retry-After": "1"})
        app.state.asked.append(asked)
        if "nothing" in asked["prompt"]:
            return JSONResponse({"error": {"message": "The prompt asks for nothing."}}, 400)
        return StreamingResponse(_events(asked, app.state.slow), media_type="text/event-stream")

    app.include_router(runs)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


async def _events(asked: dict[str, Any], slow: float) -> AsyncIterator[str]:
    def event(kind: str, colour: str, **more: Any) -> str:
        data = {"type": f"image_generation.{kind}", "b64_json": base64.b64encode(square(colour)).decode(), "created_at": int(time.time()), **more}
        return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"

    for i in range(asked["partial_images"]):
        yield event("partial_image", "#888", partial_image_index=i)
        await asyncio.sleep(slow)
    yield event("completed", colour_of(asked))


def colour_of(asked: dict[str, Any]) -> str:
    return f"#{digest([asked['model'], asked['prompt'], asked['seed']])[:6]}"


def square(colour: str) -> bytes:
    return png(Image.new("RGB", (16, 16), colour))
