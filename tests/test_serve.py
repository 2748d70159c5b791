"""`raybooth serve` as people start it: replicas behind Ray Serve, one of which is killed under load, and what it refuses to start with."""

import asyncio
import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from ray.exceptions import ActorDiedError
from stored import make_run

from raybooth.cli import main
from raybooth.cluster.serving import _quieten, served
from raybooth.cluster.session import Resources
from raybooth.errors import RayboothError
from raybooth.options import parser
from raybooth.serving.server import _application

GENERATIONS = "/v1/images/generations"


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, int]]:
    """URL and process id of a server; stopped by Ctrl-C at the end, and nothing of it is left."""
    command = [sys.executable, "-m", "raybooth", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"}) as process:
        said = ""
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise AssertionError(said)
        children = psutil.Process(process.pid).children(recursive=True)
        try:
            yield found[0], process.pid
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait(60) == 0, rest
    assert "serve: stopped" in rest
    assert "Traceback" not in rest, rest
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def replicas(pid: int) -> list[psutil.Process]:
    for _ in range(100):  # a process that is about to change its title has none for a moment
        found = [p for p in psutil.Process(pid).children(recursive=True) if re.search(r"ServeReplica:raybooth-\S+:Drawer", title(p))]
        if found:
            return found
        time.sleep(0.05)
    return []


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def counting() -> list[str]:
    """What Serve does in this process beside drawing: it counts requests and tells its controller of them."""
    from ray.serve._private.router import SingletonThreadRouter

    loop = SingletonThreadRouter._asyncio_loop
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks(loop)] if loop else []
    return [name for name in names if name == "MetricsPusher.metrics_task"]


def asked(model: str, seed: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "photo of a dog", "model": model, "seed": seed, "metadata": False, **more}


def test_a_replica_is_killed_under_load_and_a_subject_comes_and_goes(tmp_path: Path, toy: Path):
    folder = tmp_path / "kennel"
    for i, name in enumerate(("rex", "lassie")):
        make_run(folder / name, toy, i)

    async def scenario(url: str, pid: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:

            async def draw(model: str, seed: int) -> tuple[int, Any]:
                answer = await http.post(GENERATIONS, json=asked(model, seed))
                return answer.status_code, answer.json()

            def picture(answer: tuple[int, Any]) -> str:
                assert answer[0] == 200, answer
                return str(answer[1]["data"][0]["b64_json"])

            models = ("rex", "lassie", "base")
            alone = {(m, s): picture(await draw(m, s)) for m in models for s in (1, 2)}
            assert len(set(alone.values())) == 6

            make_run(folder / "fido", toy, 3)
            await asyncio.sleep(1.2)
            assert {m["id"] for m in (await http.get("/v1/models")).json()["data"]} == {*models, "fido"}
            assert picture(await draw("fido", 1)) not in alone.values()
            shutil.rmtree(folder / "fido")
            await asyncio.sleep(1.2)
            assert (await draw("fido", 1))[0] == 404

            waiting = [asyncio.create_task(draw(m, s)) for _ in range(8) for m, s in alone]
            await asyncio.sleep(0.2)
            (replica,) = replicas(pid)
            replica.send_signal(signal.SIGKILL)
            began = time.monotonic()
            for task, key in zip(waiting, [key for _ in range(8) for key in alone], strict=True):
                answer = await task
                if answer[0] == 200:
                    assert picture(answer) == alone[key], "drawn again it is the same"
                else:
                    assert answer[0] == 503
                    assert answer[1]["error"]["type"] == "server_error"
            while (await draw("rex", 1))[0] != 200:
                await asyncio.sleep(0.2)
            seconds = time.monotonic() - began
            print(f"whole again {seconds:.1f} s after SIGKILL")
            assert seconds < 20 * max(1, os.getloadavg()[0] / 2)  # 20 s on two cores that are free
            assert replicas(pid) != [replica]
            assert (await http.get("/healthz")).json() == {"status": "ok"}

    with serving(str(folder), "--replicas", "1") as (url, pid):
        asyncio.run(scenario(url, pid))


def test_servers_and_others_share_a_cluster(ray: None):
    """What one of them leaves, the others keep."""
    from ray import serve

    class Other:
        pass

    other: Any = serve.deployment(ray_actor_options={"num_cpus": 0.1})(Other)
    how: Any = {"have": Resources(2, 0, 1), "model_bytes": 0, "replicas": (1, 1), "batch": 1, "queue": 1, "joined": True}
    try:
        serve.run(other.bind(), name="other", route_prefix=None)
        with served(SimpleNamespace, "raybooth-one", **how) as one:
            with served(SimpleNamespace, "raybooth-two", **how) as two:
                assert one.pids.remote().result() != two.pids.remote().result()
                assert counting()
            assert set(serve.status().applications) == {"other", "raybooth-one"}
            assert asyncio.run(one.healthy())
            assert not asyncio.run(two.healthy())
        assert set(serve.status().applications) == {"other"}
        assert not counting(), "Ray may go now, and a thread that still asks it is a traceback"
    finally:
        serve.shutdown()


def test_replicas_that_cannot_be_made_say_why(ray: None):
    make: Any = partial(exec, "from raybooth.errors import RayboothError; raise RayboothError('The model has gone: fetch it again.')")
    how: Any = {"have": Resources(2, 0, 1), "model_bytes": 0, "replicas": (1, 1), "batch": 1, "queue": 1, "joined": True}
    with (
        pytest.raises(RayboothError, match=r"^No replica can be made: .*The model has gone: fetch it again\.$"),
        served(make, "raybooth-none", **how),
    ):
        pass


def test_what_serve_forgets_of_a_lost_replica_is_no_traceback(caplog: pytest.LogCaptureFixture):
    """Other forgotten mistakes still are one."""
    _quieten()

    async def forgetful() -> None:
        for error in (ActorDiedError(), ValueError("a mistake")):
            asyncio.get_running_loop().create_future().set_exception(error)  # which nobody looks at
            gc.collect()

    asyncio.run(forgetful())
    assert [type(r.exc_info[1]) for r in caplog.records if r.name == "asyncio" and r.exc_info] == [ValueError]


def test_servers_have_names_of_their_own():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        assert _application(one) != _application(two)
        assert _application(one) == _application(one)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{storage}", "--host", "0.0.0.0"], "there are no API keys"),
        (["{storage}", "--api-key-file", "{storage}/none"], "cannot be read"),
        (["{storage}/none"], "There is no"),
        (["{storage}"], "no finished run"),
        (["{storage}", "--base", "no/such"], "not a model folder"),
        (["{storage}", "--replicas", "4-1"], "--replicas 4-1"),
        (["{storage}", "--port", "{taken}"], "cannot be listened at"),
        (["{storage}", "--port", "70000"], "--port 70000 is not a port"),
        (["{storage}", "--host", "a..b", "--insecure"], "check --host"),
        (["~nobody1/x", "--base", "mini"], "home folder that is not known"),
        (["{storage}", "--base", "mini", "--set", "finetune.stepz=1"], "did you mean finetune.steps?"),
    ],
)
def test_what_it_does_not_start_with(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = [] if "--port" in arguments else ["--port", "0"]
        given = [a.format(storage=tmp_path, taken=taken.getsockname()[1]) for a in arguments]
        assert main(["serve", *given, *port]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_how_long_a_request_may_take():
    given = ["serve", "x", "--timeout"]
    assert parser().parse_args([*given[:2]]).timeout == 120
    assert parser().parse_args([*given, "2.5"]).timeout == 2.5
    for wrong in ("0", "-1", "nan", "inf", "1e9", "99999"):
        with pytest.raises(SystemExit):
            parser().parse_args([*given, wrong])
