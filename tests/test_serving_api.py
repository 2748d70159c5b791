"""The API without Ray: OpenAI's shapes and client, limits, keys, streams, URLs, and places that are freed."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from api_client import ASKED, GENERATIONS, app_with_runs, client, live, picture, quick, sent
from fastapi import APIRouter
from PIL import Image

from raybooth.errors import NotFiniteError, RayboothError
from raybooth.jobs import drawing_digest
from raybooth.serving.api import create_app
from raybooth.serving.batcher import Batcher, Drawn, Job
from raybooth.serving.engine import Engine
from raybooth.serving.generations import Draw, UnavailableError
from raybooth.serving.guard import LOOPBACK, read_keys
from raybooth.serving.runs import MOST_UPLOADS
from raybooth.serving.schemas import Limits
from raybooth.serving.server import Options, _hosts, slot_rank
from raybooth.serving.subjects import Subjects
from raybooth.workspace import Workspace


@pytest.fixture(scope="module")
def batcher(subjects: Subjects) -> Batcher:
    return Batcher(Engine(subjects.base, slot_rank(subjects)))


def test_the_openai_client_works_unchanged(subjects: Subjects, batcher: Batcher):
    with live(create_app(subjects, batcher.draw, keys=["sesame"])) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0) as api:
        assert [m.id for m in api.models.list()] == ["base", "lassie", "rex"]
        assert api.models.retrieve("rex").owned_by == "raybooth"
        answer = api.images.generate(model="rex", prompt="photo of {subject}", n=2, size="32x32", extra_body={"seed": 5, "steps": 2})
        assert answer.data is not None
        assert len(answer.data) == 2
        image = picture(answer.data[1].b64_json or "")
        assert (image.size, image.info["prompt"], image.info["seed"]) == ((32, 32), "photo of unqtkn dog", "6")
        assert image.info["model"] == drawing_digest(Workspace(str(subjects.found()["rex"].weights.parent)), "fine-tuned-model")  # as `generate` says it
        other = api.images.generate(model="lassie", prompt="photo of {subject}", extra_body={"seed": 6, "steps": 2})
        assert other.data is not None
        assert picture(other.data[0].b64_json or "").tobytes() != image.tobytes()
        events = list(api.images.generate(model="rex", prompt="photo of {subject}", stream=True, partial_images=2, extra_body={"seed": 6, "steps": 4}))
        assert [e.type for e in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
        assert [e.partial_image_index for e in events if e.type == "image_generation.partial_image"] == [0, 1]
        for wrong, kind, code in (
            ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
            ({"size": "1024x1024"}, openai.BadRequestError, "invalid_value"),
            ({"extra_body": {"steps": 10**6}}, openai.BadRequestError, "invalid_value"),
            ({"extra_body": {"sed": 1}}, openai.BadRequestError, "unknown_parameter"),
        ):
            given: dict[str, Any] = {"model": "rex", "prompt": "a dog", **wrong}
            with pytest.raises(kind) as caught:
                api.images.generate(**given)
            assert caught.value.code == code
            assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.AuthenticationError):
            api.with_options(api_key="wrong").models.list()


async def generated(http: httpx.AsyncClient, **more: Any) -> list[dict[str, Any]]:
    answer = await http.post(GENERATIONS, json={**ASKED, **more})
    assert answer.status_code == 200, answer.text
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def test_same_seed_same_picture_alone_or_in_company(subjects: Subjects, batcher: Batcher):
    async def scenario() -> None:
        async with client(create_app(subjects, batcher.draw)) as http:
            wishes = [{"model": m, "seed": s, "n": n} for m, s, n in (("rex", 3, 3), ("lassie", 3, 1), ("base", 8, 2), ("rex", 4, 1), ("lassie", 9, 2))]
            for wish in wishes:
                wish["prompt"] = "photo of a dog"
            together = await asyncio.gather(*(generated(http, **w) for w in wishes))
            alone = [await generated(http, **w) for w in wishes]
            assert together == alone
            assert together[3][0]["b64_json"] == together[0][1]["b64_json"], "picture k has the seed of the request + k"
            assert [p["seed"] for p in together[0]] == [3, 4, 5]
            bare = (await generated(http, metadata=False))[0]["b64_json"]
            assert not picture(bare).info
            assert picture(bare).tobytes() == picture((await generated(http))[0]["b64_json"]).tobytes()
            drawn = await http.get("/metrics")
            assert 'raybooth_pictures_total{model="rex"}' in drawn.text
            assert "raybooth_pictures_waited_for 0.0" in drawn.text

    asyncio.run(scenario())


def test_models_photographs_and_urls(subjects: Subjects):
    async def scenario() -> None:
        limits = Limits(kept_bytes=300)
        async with client(create_app(subjects, quick(), limits)) as http:
            rex = (await http.get("/v1/models/rex")).json()
            assert (rex["class"], rex["token"], rex["prompt"], rex["kind"], rex["size"]) == ("dog", "unqtkn", "photo of unqtkn dog", "lora", "32x32")
            photograph = await http.get(rex["photographs"][0])
            assert photograph.headers["content-type"] == "image/png"
            assert Image.open(BytesIO(photograph.content)).getpixel((0, 0)) == (1, 0, 0)
            for path in ("/v1/models/rex/photographs/1", "/v1/models/rex/photographs/-1", "/v1/models/..%2f..%2fetc/photographs/0", "/v1/models/%2e%2e"):
                assert (await http.get(path)).status_code == 404
            url = (await generated(http, response_format="url"))[0]["url"]
            assert (await http.get(url)).content.startswith(b"\x89PNG")
            for _ in range(6):
                await generated(http, response_format="url")
            assert (await http.get(url)).status_code == 404, "the oldest go"

    asyncio.run(scenario())


def test_errors_have_one_shape(subjects: Subjects):
    async def scenario() -> None:
        limits = Limits(prompt=20, n=2, body=500)
        app = create_app(subjects, quick(), limits, keys=["a", "b"], hosts=LOOPBACK)
        key = {"Authorization": "Bearer b"}
        async with client(app) as http:
            cases: list[tuple[str, str, Any, int, str]] = [
                ("GET", "/v1/models", {}, 401, "invalid_api_key"),
                ("POST", GENERATIONS, {"json": ASKED, "headers": {"Authorization": "Bearer c"}}, 401, "invalid_api_key"),
                ("GET", "/metrics", {"headers": {"Authorization": "Basic b"}}, 401, "invalid_api_key"),
                ("GET", "/nothing", {}, 404, "not_found"),
                ("DELETE", "/healthz", {}, 405, "method_not_allowed"),
                ("GET", "/healthz", {"headers": {"Host": "evil.example"}}, 400, "wrong_host"),
                ("POST", GENERATIONS, {"json": ASKED, "headers": {**key, "Origin": "http://evil.example"}}, 403, "wrong_origin"),
                ("POST", GENERATIONS, {"content": b"{", "headers": {**key, "Content-Type": "application/json"}}, 400, "invalid_json"),
                ("POST", GENERATIONS, {"content": b"x=1", "headers": key}, 400, "invalid_content_type"),
                ("POST", GENERATIONS, {"json": {"prompt": "x" * 600}, "headers": key}, 413, "request_too_large"),
                ("POST", GENERATIONS, {"json": {}, "headers": key}, 400, "missing_required_parameter"),
                ("POST", GENERATIONS, {"json": {"prompt": "a dog"}, "headers": key}, 400, "missing_required_parameter"),
                *(
                    ("POST", GENERATIONS, {"json": {**ASKED, **wrong}, "headers": key}, 400, "invalid_value")
                    for wrong in ({"prompt": "x" * 21}, {"prompt": "  "}, {"n": 3}, {"n": True}, {"n": "1"}, {"seed": -1}, {"steps": 101}, {"size": "0x0"})
                ),
            ]  # fmt: skip
            for method, path, how, status, code in cases:
                answer = await http.request(method, path, **how)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), (path, how, answer.text)
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            for path in ("/healthz", "/openapi.json", "/docs"):
                assert (await http.get(path)).status_code == 200
                assert (await http.head(path)).status_code == 200
            assert (await http.head("/v1/models")).status_code == 401

            async def endless() -> AsyncIterator[bytes]:
                for _ in range(100):
                    yield b" " * 100

            answer = await http.post(GENERATIONS, content=endless(), headers={**key, "Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")

    asyncio.run(scenario())


def test_the_queue_is_bounded_and_time_too(subjects: Subjects):
    async def scenario() -> None:
        async with client(create_app(subjects, quick(0.3), Limits(queue=3))) as http:
            answers = await asyncio.gather(*(http.post(GENERATIONS, json=ASKED) for _ in range(8)))
            assert sorted(a.status_code for a in answers) == [200] * 3 + [429] * 5
            assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
            await generated(http, n=3)
        async with client(create_app(subjects, quick(30), Limits(seconds=0.2, queue=1))) as http:
            for _ in range(2):
                answer = await http.post(GENERATIONS, json=ASKED)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
                assert "retry-after" in answer.headers

    asyncio.run(scenario())


def test_when_to_try_again_follows_from_what_was_drawn(subjects: Subjects):
    """Of late, and not from how long those waited who wanted them: with forty before them that is forty times as much."""
    one_at_a_time = asyncio.Lock()

    async def draw(job: Job) -> AsyncGenerator[Drawn, None]:
        async with one_at_a_time:
            async for drawn in quick(0.05)(job):
                yield drawn

    async def scenario() -> None:
        async with client(create_app(subjects, draw, Limits(queue=40))) as http:
            for _ in range(2):
                answers = await asyncio.gather(*(http.post(GENERATIONS, json=ASKED) for _ in range(60)))
                refused = [a for a in answers if a.status_code == 429]
                assert len(refused) + sum(a.status_code == 200 for a in answers) == 60
            assert refused
            assert all(int(a.headers["retry-after"]) <= 3 for a in refused)  # half of forty are a second

    asyncio.run(scenario())


def test_under_which_names_it_is_asked(subjects: Subjects, tmp_path: Path):
    """A page elsewhere can have its own name point here, and never an address."""
    (tmp_path / "keys").write_text("k")

    def options(**how: Any) -> Options:
        return Options(["x"], **how)

    local, key = {"localhost": 200, "127.0.0.1:8000": 200, "[::1]:80": 200}, {"api_key_file": tmp_path / "keys"}
    cases: list[tuple[Options, dict[str, int]]] = [
        (options(), local | {"evil.example": 400, "draw.example": 400, "": 400}),
        (options(allow_host=["Draw.example"]), local | {"draw.example:443": 200, "evil.example": 400}),
        (options(host="0.0.0.0", insecure=True), local | {"10.0.0.7:8000": 200, "evil.example": 400}),
        (options(host="box.lan", insecure=True, allow_host=["draw.example"]), {"box.lan": 200, "draw.example": 200, "evil.example": 400}),
        (options(host="0.0.0.0", **key), {"any.example": 200}),
        (options(host="0.0.0.0", allow_host=["draw.example"], **key), {"draw.example": 200, "evil.example": 400}),
    ]

    async def scenario() -> None:
        for given, names in cases:
            async with client(create_app(subjects, quick(), hosts=_hosts(given))) as http:
                for name, status in names.items():
                    answer = await http.get("/healthz", headers={"Host": name})
                    assert answer.status_code == status, (given, name)
                    assert status == 200 or answer.json()["error"]["code"] == "wrong_host"

    asyncio.run(scenario())


def test_what_breaks_is_a_clean_error(subjects: Subjects, caplog: pytest.LogCaptureFixture):
    def failing(error: Exception, after: int = 0) -> Draw:
        async def draw(job: Job) -> AsyncGenerator[Drawn, None]:
            async for drawn in quick()(job):
                if drawn.row >= after:
                    raise error
                yield drawn

        return draw

    async def scenario() -> None:
        for error, code in ((UnavailableError("x"), "unavailable"), (RayboothError("x"), "model_unavailable"), (MemoryError("secret"), "failed")):
            async with client(create_app(subjects, failing(error))) as http:
                answer = await http.post(GENERATIONS, json=ASKED)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
                assert "secret" not in answer.text
        async with client(create_app(subjects, failing(NotFiniteError([0])))) as http:
            answer = await http.post(GENERATIONS, json=ASKED)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_finite")
            assert "retry-after" not in answer.headers, "it would draw nothing the next time either"
        async with client(create_app(subjects, failing(ValueError(), after=1))) as http:
            answer = await http.post(GENERATIONS, json={**ASKED, "n": 2, "stream": True})
            events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
            assert [e["type"] for e in events] == ["image_generation.completed", "error"]
            assert events[1]["error"]["code"] == "failed"

    asyncio.run(scenario())
    assert "a batch failed" in caplog.text


def test_a_client_that_goes_away_frees_its_place(subjects: Subjects, batcher: Batcher):
    """Streaming or not: its pictures leave the queue, and a batch that nobody waits for ends."""

    async def scenario(stream: bool) -> None:
        app = create_app(subjects, batcher.draw, Limits(queue=12, n=12, steps=1000, prompt=50))
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not receive.sent:  # type: ignore[attr-defined]
                receive.sent = True  # type: ignore[attr-defined]
                return {"type": "http.request", "body": json.dumps({**ASKED, "n": 12, "steps": 1000, "stream": stream}).encode()}
            await left.wait()
            return {"type": "http.disconnect"}

        receive.sent = False  # type: ignore[attr-defined]
        said: list[Any] = []

        async def send(message: Any) -> None:
            said.append(message)

        headers = [(b"host", b"x"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": GENERATIONS, "raw_path": GENERATIONS.encode(), "query_string": b"", "headers": headers,
            "scheme": "http", "server": ("x", 80), "client": ("x", 1), "http_version": "1.1", "root_path": "", "asgi": {"version": "3.0"},
        }  # fmt: skip
        asking = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
        while not (batcher.waiting and batcher._work and not batcher._work.done()):
            await asyncio.sleep(0.05)
        left.set()
        await asyncio.wait_for(asking, 5)
        assert not batcher.waiting
        async with client(app) as http:
            began = time.monotonic()
            await generated(http, n=12, steps=1)
            assert time.monotonic() - began < 30  # a thousand steps would take longer
        assert not any(m.get("body") for m in said)

    for stream in (False, True):
        asyncio.run(scenario(stream))


def test_an_upload_that_is_broken_off_is_nobodys_mistake(subjects: Subjects, kennel: Path, capfd: pytest.CaptureFixture[str]):
    with live(app_with_runs(subjects, kennel)) as url:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(MOST_UPLOADS + 1):
            with socket.create_connection((host, int(port))) as half:
                half.sendall(sent("POST", "/api/runs", "multipart/form-data; boundary=b", "999", b"--b\r\n"))
                time.sleep(0.1)
        counted = httpx.get(f"{url}/metrics").text
        assert 'path="/api",status="499"' in counted
        assert 'path="/api",status="5' not in counted
        assert httpx.post(f"{url}/api/runs").status_code == 400, "their places are free"
    assert "Traceback" not in capfd.readouterr().err


def test_what_the_safety_checker_keeps_back(subjects: Subjects, batcher: Batcher):
    async def scenario() -> None:
        strict = Batcher(batcher.engine, lambda images: [True] * len(images))
        async with client(create_app(subjects, strict.draw)) as http:
            for stream in (False, True):
                answer = await http.post(GENERATIONS, json={**ASKED, "stream": stream, "partial_images": 2})
                assert (answer.status_code, answer.json()["error"]["code"]) == (400, "moderation_blocked")

    asyncio.run(scenario())


def test_a_page_and_other_routers_beside_it(subjects: Subjects, tmp_path: Path):
    (tmp_path / "index.html").write_text("<h1>kennel</h1>")
    router = APIRouter(prefix="/api")
    router.add_api_route("/runs", lambda: ["one"])

    async def scenario() -> None:
        async with client(create_app(subjects, quick(), keys=["k"], routers=[router], page=tmp_path)) as http:
            assert "kennel" in (await http.get("/")).text
            assert (await http.get("/api/runs")).status_code == 401
            assert (await http.get("/api/runs", headers={"Authorization": "Bearer k"})).json() == ["one"]
            assert (await http.get("/missing.js")).json()["error"]["code"] == "not_found"
            assert (await http.get("/%2e%2e/%2e%2e/etc/passwd")).status_code == 404

    asyncio.run(scenario())


def test_keys_from_a_file(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# of the lab\n\n one \ntwo\n")
    assert read_keys(file) == ["one", "two"]
    file.write_bytes(b"\xef\xbb\xbfone\r\n")  # as Windows' Notepad writes it
    assert read_keys(file) == ["one"]
    for text in (None, "", "# nothing\n", "cl\u00e9\n", "a\x07b\n"):
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        with pytest.raises(RayboothError, match="API keys"):
            read_keys(file)
