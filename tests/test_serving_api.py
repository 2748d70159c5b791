"""The API without Ray: OpenAI's shapes and client, limits, keys, streams, URLs, places that are freed, and whatever else people send."""

import asyncio
import base64
import contextlib
import json
import os
import random
import socket
import string
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import stand_in
import uvicorn
from fastapi import APIRouter, FastAPI
from PIL import Image
from stored import make_run
from test_runs import MINI, PHOTOS, SETTINGS

from raybooth.errors import RayboothError
from raybooth.serving import uploads
from raybooth.serving.api import create_app
from raybooth.serving.desk import Desk, Drawn, Job
from raybooth.serving.engine import Engine
from raybooth.serving.generations import Draw, UnavailableError
from raybooth.serving.guard import LOOPBACK, read_keys
from raybooth.serving.queue import Queue
from raybooth.serving.runs import MOST_UPLOADS, Workshop, runs_router
from raybooth.serving.schemas import Limits
from raybooth.serving.server import Options, _hosts, slot_rank
from raybooth.serving.subjects import Subjects

GENERATIONS = "/v1/images/generations"
ASKED = {"prompt": "photo of {subject}", "model": "rex", "seed": 1}


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Subjects:
    folder = tmp_path_factory.mktemp("kennel")
    make_run(folder / "rex", toy, 1)
    make_run(folder / "lassie", toy, 2)
    return Subjects([str(folder)])


@pytest.fixture(scope="module")
def desk(subjects: Subjects) -> Desk:
    return Desk(Engine(subjects.base, slot_rank(subjects)))


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


def quick(pictures: int = 0, wait: float = 0.0) -> Draw:
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


def test_the_openai_client_works_unchanged(subjects: Subjects, desk: Desk):
    with live(create_app(subjects, desk.draw, keys=["sesame"])) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0) as api:
        assert [m.id for m in api.models.list()] == ["base", "lassie", "rex"]
        assert api.models.retrieve("rex").owned_by == "raybooth"
        answer = api.images.generate(model="rex", prompt="photo of {subject}", n=2, size="32x32", extra_body={"seed": 5, "steps": 2})
        assert answer.data is not None
        assert len(answer.data) == 2
        image = picture(answer.data[1].b64_json or "")
        assert (image.size, image.info["prompt"], image.info["seed"]) == ((32, 32), "photo of unqtkn dog", "6")
        assert image.info["model"] == subjects.found()["rex"].model
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


def test_same_seed_same_picture_alone_or_in_company(subjects: Subjects, desk: Desk):
    async def scenario() -> None:
        async with client(create_app(subjects, desk.draw)) as http:
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
        async with client(create_app(subjects, quick(wait=0.3), Limits(queue=3))) as http:
            answers = await asyncio.gather(*(http.post(GENERATIONS, json=ASKED) for _ in range(8)))
            assert sorted(a.status_code for a in answers) == [200] * 3 + [429] * 5
            assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
            await generated(http, n=3)
        async with client(create_app(subjects, quick(wait=30), Limits(seconds=0.2, queue=1))) as http:
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
            async for drawn in quick(wait=0.05)(job):
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
        async with client(create_app(subjects, failing(ValueError(), after=1))) as http:
            answer = await http.post(GENERATIONS, json={**ASKED, "n": 2, "stream": True})
            events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
            assert [e["type"] for e in events] == ["image_generation.completed", "error"]
            assert events[1]["error"]["code"] == "failed"

    asyncio.run(scenario())
    assert "a batch failed" in caplog.text


def test_a_client_that_goes_away_frees_its_place(subjects: Subjects, desk: Desk):
    """Streaming or not: its pictures leave the queue, and a batch that nobody waits for ends."""

    async def scenario(stream: bool) -> None:
        app = create_app(subjects, desk.draw, Limits(queue=12, n=12, steps=1000, prompt=50))
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
        while not (desk.waiting and desk._work and not desk._work.done()):
            await asyncio.sleep(0.05)
        left.set()
        await asyncio.wait_for(asking, 5)
        assert not desk.waiting
        async with client(app) as http:
            began = time.monotonic()
            await generated(http, n=12, steps=1)
            assert time.monotonic() - began < 30  # a thousand steps would take longer
        assert not any(m.get("body") for m in said)

    for stream in (False, True):
        asyncio.run(scenario(stream))


def test_an_upload_that_is_broken_off_is_nobodys_mistake(subjects: Subjects, kennel: Path, capfd: pytest.CaptureFixture[str]):
    with live(create_app(subjects, quick(), routers=[runs_router(Workshop(kennel, MINI, SETTINGS, Queue(nothing)))])) as url:
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


def test_what_the_safety_checker_keeps_back(subjects: Subjects, desk: Desk):
    async def scenario() -> None:
        strict = Desk(desk.engine, lambda images: [True] * len(images))
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


@pytest.fixture
def kennel(tmp_path: Path) -> Path:
    """rex, learnt before."""
    storage = tmp_path / "rex"
    uploads.store(storage, uploads.settings(storage, MINI.base, {"class": "dog"}, SETTINGS), [uploads.Photo("a.png", PHOTOS[0])])
    stand_in.run(storage)
    return tmp_path


def nothing(storage: Path) -> list[str]:
    """What a run does here."""
    return [sys.executable, "-c", ""]


def nonsense(r: random.Random) -> Any:
    kinds = [
        lambda: None, lambda: r.choice([True, False]), lambda: r.choice([-1, 0, 2**31, 2**63, 10**30, 1e308, -0.0, 0.5]),
        lambda: r.choice(["", "\x00", "../../etc/passwd", "%s%n", "{subject.__class__}", "{0}", "\ud800", "é" * 300, "rex", "64x64", "💥", "a" * 70_000]),
        lambda: [nonsense(r) for _ in range(r.randrange(3))], lambda: {r.choice("ab"): nonsense(r)},
    ]  # fmt: skip
    return r.choice(kinds)()


def malformed(r: random.Random) -> bytes:
    """Something that may arrive at a socket."""
    fields = ["prompt", "model", "n", "size", "seed", "steps", "stream", "partial_images", "response_format", "guidance", "metadata", "user", "nonsense"]
    asked = {**(ASKED if r.random() < 0.8 else {}), **{r.choice(fields): nonsense(r) for _ in range(r.randrange(1, 3))}}
    body = json.dumps(asked, allow_nan=True).encode()
    if r.random() < 0.3:
        body = r.choice([body[: r.randrange(len(body))], r.randbytes(99), b"[" * 5000, b"9" * 5000, b"NaN", b"null", b'"x"', b""])
    name = "".join(r.choice(string.ascii_letters + "éß/\\.%\x01 ?#") for _ in range(r.randrange(1, 40)))
    files = ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "rex%00", "rex/photographs/%2e%2e", name]
    path = r.choice([GENERATIONS] * 8 + [f"{start}{r.choice(files)}" for start in ("/v1/models/", "/pictures/", "/v1/models/rex/photographs/", "/")])
    method = r.choice(["POST"] * 12 + ["GET"] * 4 + ["PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "BREW"])
    length = r.choice([str(len(body))] * 20 + ["-1", "9" * 30, "x"])
    kind = r.choice(["application/json"] * 8 + ["text/plain", "", "application/json; charset=utf-16", "multipart/form-data", "\xff"])
    return sent(method, path, kind, length, body)


def malformed_upload(r: random.Random) -> bytes:
    """The same for runs."""
    called = ["", *(f'; filename="{f}"' for f in ("a.png", "../../../etc/cron.d/x", "\x00", "a" * 300))]
    values = [b"rex", b"fido", b"dog", b"../x", b"\xff\xfe", b"\x00", b"+2AA-", b"\\ud800", b"", b"a" * 5000, r.randbytes(50), PHOTOS[0]]
    names = [r.choice(["photos", "name", "class", "token", "nonsense", "", "é\xff"]) for _ in range(r.randrange(5))]
    rows = names if r.random() < 0.5 else ["photos", "name", "class"]
    parts = [f'--b\r\nContent-Disposition: form-data; name="{n}"{r.choice(called)}\r\n\r\n'.encode() + r.choice(values) + b"\r\n" for n in rows]
    body = b"".join(parts) + r.choice([b"--b--\r\n"] * 6 + [b"", b"--b", b"--c--\r\n"])
    if r.random() < 0.2:
        body = r.choice([body[: r.randrange(len(body) + 1)], r.randbytes(99), b"", b"--b\r\n" * 300, b"--b\r\nContent-Disposition: " + b"x" * 9000])
    encodings = ["punycode", "idna", "utf-7", "unicode_escape", "utf-16", "zlib", "nonsense", '"a\\0b"', "utf-8"]
    kind = r.choice(["multipart/form-data; boundary=b"] * 8 + ["multipart/form-data", "multipart/form-data; boundary=", "application/json", "\xff"])
    kind += r.choice([""] * 8 + [f"; charset={e}" for e in encodings])
    files = ["rex/pictures/..%2fconfig.json", "rex/pictures/photographs/00.png", "%2e%2e", "rex%00"]
    run = r.choice(["rex", "fido", "..", "", "rex/resume", "none/resume", *files])
    method, path = r.choice([("POST", "/api/runs")] * 5 + [(m, f"/api/runs/{run}") for m in ("GET", "POST", "DELETE", "PUT")])
    return sent(method, path, kind, str(len(body)), body)


def sent(method: str, path: str, kind: str, length: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    return head.encode("latin-1", "replace") + body


def answered(url: str, request: bytes) -> tuple[int, bytes]:
    """Status and all that was answered."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sent:
        with contextlib.suppress(ConnectionError):  # it need not read to the end what it refuses
            sent.sendall(request)
        said = b""
        with contextlib.suppress(ConnectionError):
            while more := sent.recv(1 << 16):
                said += more
    return (int(said.split(b" ", 2)[1]) if said else 0), said


def test_malformed_requests_are_the_senders_mistake(subjects: Subjects, kennel: Path):
    """Five hundred at a socket, and three hundred uploads: no answer of 500 or above, errors in their shape, no file opened outside of the storage."""
    opened: list[str] = []
    watching = True

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if watching and name == "open" and isinstance(args[0], str | bytes):
            opened.append(os.fsdecode(args[0]))

    r, seen = random.Random(0), Counter[int]()
    with live(create_app(subjects, quick(), routers=[runs_router(Workshop(kennel, MINI, SETTINGS, Queue(nothing)))])) as url:
        answered(url, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")  # which imports
        sys.addaudithook(hook)
        for i in range(800):
            request = malformed(r) if i < 500 else malformed_upload(r)
            status, said = answered(url, request)
            seen[status] += 1
            assert status < 500, (i, request[:300], said)
            head, _, body = said.partition(b"\r\n\r\n")
            if status >= 400 and b"application/json" in head and not request.startswith(b"HEAD"):
                assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, (request[:300], said)
            elif status >= 400 and not request.startswith(b"HEAD"):
                assert b"Invalid HTTP request received" in said, (request[:300], said)  # not even HTTP
        watching = False
        assert answered(url, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[0] == 200
    assert seen[400] > 100
    assert seen[404] > 30
    assert seen[200] > 2
    assert seen[0] < 25, "given up without an answer: those whose body never came"
    storage = next(iter(subjects._paths))
    allowed = (str(storage), str(kennel), "/proc/self", "/dev/null", sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]))
    assert not [f for f in opened if not f.startswith(allowed)]


def test_it_does_what_its_description_says(subjects: Subjects, kennel: Path):
    """Schemathesis: requests as described and others, and whether the answers are those that are described."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    schema = schemathesis.openapi.from_asgi(
        "/openapi.json", create_app(subjects, quick(), routers=[runs_router(Workshop(kennel, MINI, SETTINGS, Queue(nothing)))])
    )
    tried = set()
    for found in schema.get_all_operations():
        operation: Any = found
        for mode in GenerationMode:

            @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if case.path == GENERATIONS and isinstance(case.body, dict) and case.body.get("n") != 1:  # half of them ask for what is there
                    case.body |= {"model": "rex", "size": "auto"}
                if len(str(case.path_parameters.get("run", ""))) % 2:
                    case.path_parameters["run"] = "rex"
                tried.add((case.path, case.call_and_validate(checks=checks).status_code))

            try:
                check()
            except Exception as error:
                if "Unsatisfiable" not in type(error).__name__:  # there is nothing wrong to be said where nothing is asked
                    raise
    assert {(GENERATIONS, 200), (GENERATIONS, 400), ("/v1/models", 200), ("/v1/models/{model}", 404), ("/healthz", 200)} <= tried
    assert {("/api/runs", 200), ("/api/runs", 400), ("/api/runs/{run}", 200), ("/api/runs/{run}", 404), ("/api/runs/{run}/resume", 409)} <= tried
