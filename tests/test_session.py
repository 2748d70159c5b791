"""Ray as raybooth starts it, and the line of a fine-tuning that it carries the words of."""

import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from raybooth.cluster.session import Resources, connected
from raybooth.cluster.start import start
from raybooth.config import Config
from raybooth.errors import RayboothError
from raybooth.session import Run, StepLine, settings_of


@pytest.mark.usefixtures("ray")
def test_workers_allocate_by_jemalloc_and_nothing_else_does():
    import ray

    @ray.remote(num_cpus=0.5)
    def mapped() -> str:
        return Path("/proc/self/maps").read_text()

    assert "libjemalloc" in ray.get(mapped.remote())
    assert "LD_PRELOAD" not in os.environ


@pytest.mark.usefixtures("ray")
def test_only_nodes_that_are_there_and_work_are_counted(monkeypatch: pytest.MonkeyPatch):
    """Ray's list keeps those that have gone, and a head without CPUs draws nothing: threads are dealt by them."""
    import ray

    alive = [n for n in ray.nodes() if n["Alive"]]
    gone, head = {**alive[0], "Alive": False}, {**alive[0], "Resources": {"memory": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, gone, gone, head])
    with connected(None) as have:
        assert have.nodes == len(alive)


def test_gpus_that_torch_cannot_use_are_left_alone_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("raybooth.cluster.session.connected", lambda _: nullcontext(Resources(8, 1, 1)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for build, gpus in (("2.13.0+cpu", 0), ("2.13.0+cu130", 1), ("2.13.0", 1)):
        monkeypatch.setattr("raybooth.session.version", lambda _, build=build: build)
        with Run(Config(subject={"class": "dog"}, storage=str(tmp_path))) as run:  # type: ignore[arg-type]
            assert run.ray.gpus == gpus
        assert ("torch is its CPU build" in capsys.readouterr().err) == (gpus == 0)


def test_gpus_whose_driver_is_too_old_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A CUDA build would draw on the CPU without a word, for hours that are paid for."""
    monkeypatch.setattr("raybooth.cluster.session.connected", lambda _: nullcontext(Resources(8, 1, 1)))
    monkeypatch.setattr("raybooth.session.version", lambda _: "2.13.0+cu130")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with (
        Run(Config(subject={"class": "dog"}, storage=str(tmp_path))) as run,  # type: ignore[arg-type]
        pytest.raises(RayboothError, match="cannot use the GPUs of this machine, most likely because their driver is too old"),
    ):
        _ = run.ray


def test_the_time_left_counts_from_where_a_group_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    now, ticks = 0.0, itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: now + next(ticks) * 1e-6)
    run = Run(Config(subject={"class": "dog"}, finetune={"steps": 100}, storage=str(tmp_path)))  # type: ignore[arg-type]
    with StepLine(run) as line:

        def after(seconds: float, word: dict[str, Any]) -> str:
            nonlocal now
            now += seconds
            line.heard(word)
            return str(line.bar)

        reading = {"loss": 0.2, "instance": 0.1, "prior": 0.1, "images_per_second": None}
        assert "80/100" in after(30, {"start": 80})
        said = after(2, {"step": 90, **reading})
        assert "90/100 [00:02<00:02,  5.00step/s" in said
        after(5, {"note": "a worker was lost, the group starts again"})
        assert "40/100" in after(30, {"start": 40})
        assert "50/100 [00:10<00:50,  1.00s" in after(10, {"step": 50, **reading}).replace("1.00step/s", "1.00s")
    said = capsys.readouterr().err
    assert "the group starts again" in said
    assert ", -" not in said, "a rate below nought"


def test_settings_that_are_kept_hold_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("my-dog", "models/sd", "mini", "vit"):
        Path(folder).mkdir(parents=True)
    given = Config(
        subject={"photos": ["./my-dog", "hf://me/dog", "https://example.org/1.jpg", "gone"], "class": "dog"},  # type: ignore[arg-type]
        base={"model": "models/sd"}, evaluate={"dino": "vit", "clip": "mini"},  # type: ignore[arg-type]
    )  # fmt: skip
    kept = settings_of(given)
    assert kept["subject"]["photos"] == [str(tmp_path / "my-dog"), "hf://me/dog", "https://example.org/1.jpg", "gone"]
    assert (kept["base"]["model"], kept["evaluate"]["dino"], kept["evaluate"]["clip"]) == (str(tmp_path / "models/sd"), str(tmp_path / "vit"), "mini")
    assert kept["base"]["configuration"] is None
    assert Config(**kept).finetune == given.finetune


def test_the_configuration_that_is_kept_holds_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("models/sd").mkdir(parents=True)
    with Run(Config(subject={"class": "dog"}, base={"model": "models/sd"}, storage="run"), quiet=True) as run:  # type: ignore[arg-type]
        run.save_config()
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["storage"], kept["base"]["model"]) == (str(tmp_path / "run"), str(tmp_path / "models/sd"))


def test_ray_starts_where_the_home_folder_is_closed_and_a_cluster_that_wants_a_token_says_so(tmp_path: Path):
    """In a process of its own, which has not read Ray's settings yet."""
    (tmp_path / "home").touch()
    program = """
import os, socket
from raybooth.cluster.session import connected
from raybooth.errors import RayboothError
with connected(None) as have:
    assert have.cpus
    assert os.environ["RAY_AUTH_MODE"] == "token"
del os.environ["RAY_AUTH_TOKEN"]
from ray._raylet import AuthenticationTokenLoader
AuthenticationTokenLoader.instance().reset_cache()
with socket.create_server(("127.0.0.1", 0)) as there:
    try:
        with connected(f"127.0.0.1:{there.getsockname()[1]}"):
            pass
    except RayboothError as error:
        print(error)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {"HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert "asks for its token" in done.stdout, done.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_a_machine_too_busy_for_ray_is_given_another_chance(times: int, monkeypatch: pytest.MonkeyPatch):
    import ray

    started = []

    def init(**_: object) -> None:
        started.append(1)
        if len(started) <= times:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with nullcontext() if times == 1 else pytest.raises(RayboothError, match=r"Ray cannot be started .* timed out .* try again later"):
        start(None)
    assert len(started) == 2
