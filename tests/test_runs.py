"""Upload and run over HTTP: what is taken, what is refused, what is shown."""

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from stored import make_run

from raybooth.config import load
from raybooth.families.lora import WEIGHTS
from raybooth.mini.world import render, subject_scenes
from raybooth.pictures import png
from raybooth.serving import errors, runs, uploads
from raybooth.serving.progress import RUN_LOG
from raybooth.serving.queue import Queue
from raybooth.serving.queue import command as real_command
from raybooth.serving.runs import RunManager, ServerContext, runs_router
from raybooth.serving.server import Options, _runs
from raybooth.serving.subjects import Subjects

PHOTOS = [png(render(scene)) for scene in subject_scenes(1, "dog", 5)]
MINI = ServerContext({"model": "mini"})
SETTINGS = ["prior.images=4", "finetune.steps=40", "generate.images_per_prompt=1"]


def command(storage: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("stand_in.py")), str(storage)]


def serve(root: Path, **queue: Any) -> TestClient:
    app = FastAPI()
    errors.install(app)
    app.include_router(runs_router(RunManager(root, MINI, SETTINGS, Queue(command, **{"grace": 1, **queue}))))
    return TestClient(app)


def upload(client: TestClient, name: str = "rex", photos: list[bytes] = PHOTOS, class_name: str = "dog", file: str = "IMG.PNG", **fields: str) -> Any:
    files = [("photos", (file, data)) for data in photos]
    return client.post("/api/runs", data={"name": name, "class": class_name, **fields}, files=files or {"none": b""})


def until(client: TestClient, holds: Callable[[dict[str, Any]], Any], name: str = "rex") -> dict[str, Any]:
    end = time.monotonic() + 30
    while not holds(run := client.get(f"/api/runs/{name}").json()):
        assert time.monotonic() < end, run
        time.sleep(0.03)
    return run


def message(response: Any) -> str:
    return response.json()["error"]["message"]


def test_from_photographs_to_a_subject(client: TestClient, tmp_path: Path):
    begun = upload(client, token="sks")
    assert begun.status_code == 202, begun.text
    assert begun.json()["id"] == "rex"
    done = until(client, lambda r: r["state"] == "done")
    assert [(s["name"], s["done"], s["total"]) for s in done["stages"]] == [
        ("prepare", 5, 5), ("class-images", 4, 4), ("encode", 9, 9), ("finetune", 40, 40), ("generate", 6, 6)]  # fmt: skip
    assert (done["step"], done["steps"], done["stage"], done["error"]) == (40, 40, None, None)
    assert done["losses"] == [[10, 0.1], [20, 0.05], [30, pytest.approx(1 / 30)], [40, 0.025]]
    assert done["seconds"] > 0
    assert any("/checkpoint-images/0000100/" in p for p in done["pictures"])
    for url in done["pictures"]:
        assert client.get(url).content.startswith(b"\x89PNG")
    assert [r["id"] for r in client.get("/api/runs").json()["runs"]] == ["rex"]
    config = load(tmp_path / "rex" / "config.json")
    assert (config.finetune.method, config.base.model, config.subject.token, config.subject.class_name) == ("lora", "mini", "sks", "dog")
    assert sorted(p.name for p in (tmp_path / "rex" / "photographs").iterdir()) == [f"0{i}.png" for i in range(5)]
    assert (tmp_path / "rex" / "photographs" / "03.png").read_bytes() == PHOTOS[3]


def test_the_command_makes_what_the_settings_say(tmp_path: Path):
    """The real one, as far as its configuration: it must be read back as it was written."""
    config = uploads.settings(tmp_path / "rex", MINI.base, {"class": "dog"}, SETTINGS)
    uploads.store(tmp_path / "rex", config, [uploads.Photo("a.png", PHOTOS[0])])
    from raybooth.cli import config_of, parser

    assert config_of(parser().parse_args(real_command(tmp_path / "rex")[3:])) == config


@pytest.mark.parametrize("name", ["", ".hidden", "..", "-x", "a/b", "../up", "a b", "x" * 65, "é", "a\nb", "%2e%2e"])
def test_names_that_are_no_names(client: TestClient, tmp_path: Path, name: str):
    refused = upload(client, name)
    assert refused.status_code == 400
    assert "letters, digits" in message(refused)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fine-tuned-model", "config.json", "Config.JSON", "x.safetensors", "X.SafeTensors", "pytorch_lora_weights.safetensors"])
def test_names_that_would_hide_the_others(client: TestClient, tmp_path: Path, name: str):
    refused = upload(client, name)
    assert refused.status_code == 400
    assert "files of a run are called so" in message(refused)
    assert not list(tmp_path.iterdir())


def test_a_name_is_taken_once(client: TestClient, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    assert upload(client, "mine").status_code == 409
    assert upload(client, "Base").status_code == 409
    assert upload(client).status_code == 202
    assert upload(client).status_code == 409
    assert not list((tmp_path / "mine").iterdir())


def test_names_that_other_subjects_have(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch):
    """A file beside it, a run in another folder, and one that cannot be drawn just now."""
    monkeypatch.setattr(runs, "Queue", lambda: Queue(command))
    make_run(tmp_path / "elsewhere" / "rex", toy, 1)
    (make_run(tmp_path / "elsewhere" / "broken", toy, 1) / "config.json").write_text("{")
    (tmp_path / "runs").mkdir()
    shutil.copyfile(tmp_path / "elsewhere" / "rex" / "fine-tuned-model" / WEIGHTS, tmp_path / "runs" / "lassie.safetensors")
    paths = [str(tmp_path / "runs"), str(tmp_path / "elsewhere")]
    app = FastAPI()
    errors.install(app)
    app.include_router(_runs(Options(paths), Subjects(paths))[0])
    with TestClient(app) as client:
        for name in ("lassie", "rex", "broken"):
            assert upload(client, name).status_code == 409, name
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["lassie.safetensors"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"photos": [b"not a picture"]}, "is not a picture"),
        ({"photos": [PHOTOS[0][:300]]}, "damaged or cut off"),
        ({"photos": [PHOTOS[0], PHOTOS[0]]}, "same photograph"),
        ({"photos": []}, "no photographs"),
        ({"class_name": ""}, "subject.class is empty"),
        ({"token": "dog"}, "choose a rare word"),
        ({"token": "x" * 101}, "subject.token"),
    ],
)
def test_what_cannot_be_learnt_is_refused_at_once(client: TestClient, tmp_path: Path, change: dict[str, Any], sentence: str):
    refused = upload(client, **change)
    assert refused.status_code == 400, refused.text
    assert sentence in message(refused)
    assert str(tmp_path) not in message(refused)
    assert not list(tmp_path.iterdir())


def test_the_names_of_files_go_nowhere(client: TestClient, tmp_path: Path):
    assert upload(client, photos=PHOTOS[:1], file="../../../evil.sh").status_code == 202
    assert [p.name for p in (tmp_path / "rex" / "photographs").iterdir()] == ["00.jpg"]
    assert not list(tmp_path.parent.glob("evil*"))


def test_too_much_is_not_taken(client: TestClient, tmp_path: Path):
    assert "Too many files" in message(upload(client, photos=PHOTOS[:1] * 51))
    assert client.post("/api/runs", json={"name": "rex"}).status_code == 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-7", "unicode_escape", '"a b"'])
def test_forms_in_other_encodings(client: TestClient, tmp_path: Path, charset: str):
    body = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff+2AA-\\ud800\r\n--b--\r\n'
    answer = client.post("/api/runs", content=body, headers={"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_content_type")
    assert not list(tmp_path.iterdir())


def test_few_uploads_at_once(tmp_path: Path):
    """Their photographs lie in memory together."""
    held, arrived = asyncio.Event(), asyncio.Event()
    count = 0

    async def slow() -> AsyncIterator[bytes]:
        nonlocal count
        count += 1
        if count == runs.MOST_UPLOADS:
            arrived.set()
        yield b"--b\r\n"
        await held.wait()
        yield b"--b--\r\n"

    async def scenario() -> None:
        app = serve(tmp_path).app
        how: Any = {"base_url": "http://x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), **how) as http:
            uploads = [asyncio.create_task(http.post("/api/runs", content=slow())) for _ in range(runs.MOST_UPLOADS)]
            await arrived.wait()
            refused = await http.post("/api/runs", content=b"")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_uploads")
            assert "retry-after" in refused.headers
            held.set()
            assert [u.status_code for u in await asyncio.gather(*uploads)] == [400] * runs.MOST_UPLOADS
            assert (await http.post("/api/runs", content=b"")).status_code == 400, "there is room again"

    asyncio.run(scenario())


def test_an_upload_that_finds_no_place_leaves_nothing(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Others have taken the last one while it travelled."""
    with monkeypatch.context() as patched:
        patched.setattr(Queue, "put", lambda self, storage: False)
        assert upload(client).status_code == 429
    assert not list(tmp_path.iterdir())
    assert upload(client).status_code == 202


def test_one_runs_and_few_wait(tmp_path: Path):
    (tmp_path / "hold").touch()
    with serve(tmp_path, waiting=1) as client:
        upload(client)
        until(client, lambda r: r["step"] == 10)
        assert upload(client, "second").json()["state"] == "queued"
        refused = upload(client, "third")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
        assert not (tmp_path / "third").exists()
        assert client.delete("/api/runs/second").json()["state"] == "stopped"
        assert client.post("/api/runs/second/resume").json()["state"] == "queued"
        (tmp_path / "hold").unlink()
        until(client, lambda r: r["state"] == "done", "second")
        assert client.get("/api/runs/rex").json()["state"] == "done"


@pytest.mark.parametrize("class_name", ["dog", "mule"])
def test_a_run_is_stopped_and_goes_on(client: TestClient, tmp_path: Path, class_name: str):
    (tmp_path / "hold").touch()
    upload(client, class_name=class_name)
    until(client, lambda r: r["step"] == 10)
    assert client.delete("/api/runs/rex").status_code == 202
    stopped = until(client, lambda r: r["state"] != "running")
    assert (stopped["state"], stopped["error"], stopped["stage"]) == ("stopped", None, None)
    (tmp_path / "hold").unlink()
    assert client.post("/api/runs/rex/resume").status_code == 202
    until(client, lambda r: r["state"] == "done")
    assert client.post("/api/runs/rex/resume").status_code == 409


def test_a_run_that_goes_on_is_not_begun_once_more(tmp_path: Path):
    """Two tabs say so at once. Begun twice, it would go on behind the back of who stops it."""
    (tmp_path / "hold").touch()
    queue = Queue(command, grace=1)
    app = FastAPI()
    errors.install(app)
    app.include_router(runs_router(RunManager(tmp_path, MINI, SETTINGS, queue)))
    with TestClient(app) as client:
        upload(client)
        until(client, lambda r: r["step"] == 10)
        said = (tmp_path / "rex" / RUN_LOG).read_bytes()
        assert queue.put(tmp_path / "rex")
        assert not queue._waiting
        assert (tmp_path / "rex" / RUN_LOG).read_bytes().startswith(said)
        client.delete("/api/runs/rex")
        assert until(client, lambda r: r["state"] != "running")["state"] == "stopped"


def test_a_failure_is_told_in_its_sentence(client: TestClient):
    upload(client, class_name="failure")
    failed = until(client, lambda r: r["state"] != "running")
    assert (failed["state"], failed["error"]) == ("failed", "The loss is not finite: lower finetune.lr.")


def test_only_what_is_listed_is_shown(client: TestClient, tmp_path: Path):
    upload(client)
    until(client, lambda r: r["state"] == "done")
    (tmp_path / "mine").mkdir()  # made by hand: not a run of this API
    inside = ("config.json", "photographs/00.png", "../config.json", "%2e%2e/hold")
    for path in [*(f"rex/pictures/{name}" for name in inside), "mine", "..", "none"]:
        assert client.get(f"/api/runs/{path}").status_code == 404, path


def test_a_picture_that_goes_or_moves_while_it_is_read(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    upload(client)
    (url, *_) = until(client, lambda r: r["state"] == "done")["pictures"]
    path = tmp_path / "rex" / url.split("/pictures/")[1].partition("?")[0]
    partial = path.parent / ".partial-1" / path.name
    partial.parent.mkdir()
    data, read = path.read_bytes(), Path.read_bytes
    path.rename(partial)

    def between(happens: Callable[[], object]) -> httpx.Response:
        def first(self: Path) -> bytes:
            monkeypatch.setattr(Path, "read_bytes", read)
            happens()
            return read(self)

        monkeypatch.setattr(Path, "read_bytes", first)
        return client.get(url)

    moved = between(lambda: partial.rename(path))
    assert moved.content == data
    assert between(path.unlink).status_code == 404
