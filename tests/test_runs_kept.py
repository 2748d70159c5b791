"""Runs of the server outlive it, its versions, and folders that come and go."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stand_in
from fastapi import FastAPI
from fastapi.testclient import TestClient
from stored import make_model, make_run
from test_runs import MINI, PHOTOS, SETTINGS, command, message, serve, until, upload

from raybooth.base_model import prepare_base
from raybooth.config import Config, load
from raybooth.errors import RayboothError
from raybooth.families import mini_folder
from raybooth.manifest import read_manifest
from raybooth.serving import runs, uploads
from raybooth.serving.progress import Progress, progress
from raybooth.serving.queue import Queue
from raybooth.serving.server import Options, _runs, _section
from raybooth.serving.subjects import Subjects, of_base
from raybooth.session import Run


def test_a_run_that_was_killed_says_so(client: TestClient, tmp_path: Path):
    (tmp_path / "hold").touch()
    upload(client)
    until(client, lambda r: r["step"] == 10)
    os.kill(int((tmp_path / "rex" / ".lock").read_text().rpartition(" ")[2]), signal.SIGKILL)
    killed = until(client, lambda r: r["state"] != "running")
    assert killed["state"] == "failed"
    assert "SIGKILL" in killed["error"]


def test_a_restart_forgets_nothing(tmp_path: Path):
    with serve(tmp_path) as client:
        upload(client, "ready")
        until(client, lambda r: r["state"] == "done", "ready")
        upload(client, "bad", class_name="failure")
        until(client, lambda r: r["state"] == "failed", "bad")
        (tmp_path / "hold").touch()
        upload(client, "half")
        until(client, lambda r: r["step"] == 10, "half")
        upload(client, "never")
    # The server was closed: nothing goes on behind its back.
    with serve(tmp_path) as client:
        states = {r["id"]: r["state"] for r in client.get("/api/runs").json()["runs"]}
        assert states == {"ready": "done", "bad": "failed", "half": "stopped", "never": "stopped"}
        assert client.get("/api/runs/half").json()["step"] == 10
        (tmp_path / "hold").unlink()
        client.post("/api/runs/never/resume")
        until(client, lambda r: r["state"] == "done", "never")


def test_a_run_that_is_over_is_read_again_only_when_it_has_changed(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    upload(client)
    until(client, lambda r: r["state"] == "done")
    read: list[str] = []

    def counted(storage: Path, *state: Any) -> Progress:
        read.append(storage.name)
        return progress(storage, *state)

    monkeypatch.setattr(runs, "progress", counted)

    def pictures() -> list[str]:
        (run,) = client.get("/api/runs").json()["runs"]
        return run["pictures"]

    assert pictures() == pictures()
    assert len(read) <= 1
    before, read[:] = pictures(), []
    stand_in.run(tmp_path / "rex")  # as a command beside the server would, into other files of the same names
    assert not {url for url in pictures() if "/output-images/" in url} & set(before)
    assert read == ["rex"]


def test_a_run_whose_server_was_killed_is_seen_and_stopped(tmp_path: Path):
    with serve(tmp_path) as client:
        (tmp_path / "hold").touch()
        config = uploads.settings(tmp_path / "rex", MINI.base, {"class": "dog"}, SETTINGS)
        uploads.store(tmp_path / "rex", config, [uploads.Photo("a.png", PHOTOS[0])])
        orphan = subprocess.Popen(command(tmp_path / "rex"), start_new_session=True, stderr=subprocess.DEVNULL)
        until(client, lambda r: r["step"] == 10)
        assert client.get("/api/runs/rex").json()["state"] == "running"
        assert client.post("/api/runs/rex/resume").status_code == 409
        client.delete("/api/runs/rex")
        until(client, lambda r: r["state"] == "stopped")
        orphan.wait(5)


def test_settings_of_another_version_do_not_hide_the_others(client: TestClient, tmp_path: Path):
    upload(client)
    until(client, lambda r: r["state"] == "done")
    upload(client, "old")
    until(client, lambda r: r["state"] == "done", "old")
    path = tmp_path / "old" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gone": 1}))
    assert [r["id"] for r in client.get("/api/runs").json()["runs"]] == ["rex"]
    assert "gone is not a known setting" in message(client.get("/api/runs/old"))


def test_only_a_folder_of_runs_takes_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "Queue", lambda: Queue(command))
    (tmp_path / "runs").mkdir()
    (tmp_path / "one" / "fine-tuned-model").mkdir(parents=True)
    subjects = Subjects([str(tmp_path / "one"), str(tmp_path / "runs")], mini_folder())
    assert _runs(Options([str(tmp_path / "one"), "memory://somewhere"]), subjects) == []
    (router,) = _runs(Options([str(tmp_path / "one"), str(tmp_path / "runs")], set=["finetune.steps=7"]), subjects)
    app = FastAPI()
    app.include_router(router)
    with TestClient(app) as client:
        upload(client)
        client.delete("/api/runs/rex")
    config = load(tmp_path / "runs" / "rex" / "config.json")
    assert (config.base.model, config.finetune.steps, config.finetune.method) == ("mini", 7, "lora")


def test_a_run_knows_where_its_base_comes_from(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """And not only in which run's folder the server has found it."""
    monkeypatch.setattr(runs, "Queue", lambda: Queue(lambda storage: [sys.executable, "-c", ""]))
    source = tmp_path / "models" / "toy"
    shutil.copytree(toy, source)
    kennel = tmp_path / "runs"
    with Run(Config(subject={"class": "dog"}, base={"model": str(source), "resolution": 32}, storage=str(kennel / "rex")), quiet=True) as run:  # type: ignore[arg-type]
        prepare_base(run)
    make_model(run.workspace, source, 1)
    run.save_config()
    app = FastAPI()
    app.include_router(_runs(Options([str(kennel)]), Subjects([str(kennel)]))[0])
    with TestClient(app) as client:
        assert upload(client, "lassie").status_code == 202
    config = load(kennel / "lassie" / "config.json")
    assert (config.base.model, config.base.resolution) == (str(source), 32)
    shutil.rmtree(kennel / "rex")
    with Run(config) as run:
        copied = read_manifest(run.base_folder)
        assert copied is not None
        prepare_base(run)
        assert "base-model: up to date" in capsys.readouterr().err, "it has a copy of the server's"
        assert read_manifest(run.base_folder) == copied
        shutil.rmtree(source)
        prepare_base(run)
        assert "the copy of the model is kept" in capsys.readouterr().err
    assert _section(of_base(make_run(tmp_path / "whole", toy, None) / "fine-tuned-model")) == {"model": str(tmp_path / "whole" / "fine-tuned-model")}
    other = config.model_copy(update={"base": config.base.model_copy(update={"model": str(tmp_path / "other")})})
    with Run(other) as run, pytest.raises(RayboothError):
        prepare_base(run)


def removed(storage: Path) -> None:
    """As somebody does who clears up while a run still writes there."""
    storage.rename(storage.with_name(".bin"))
    shutil.rmtree(storage.with_name(".bin"), ignore_errors=True)


def test_a_run_that_is_removed_does_not_keep_the_others_from_their_turn(client: TestClient, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "hold").touch()
    for name in ("rex", "second", "third"):
        upload(client, name)
    until(client, lambda r: r["step"] == 10)
    removed(tmp_path / "second")  # one that waits
    assert client.get("/api/runs/second").status_code == 404
    pid = int((tmp_path / "rex" / ".lock").read_text().rpartition(" ")[2])
    os.kill(pid, signal.SIGSTOP)
    removed(tmp_path / "rex")  # the one that runs: its last words have no place to go to
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "hold").unlink()
    until(client, lambda r: r["state"] == "done", "third")
    assert [r["id"] for r in client.get("/api/runs").json()["runs"]] == ["third"]
    assert "second cannot be started" in caplog.text
    assert upload(client, "second").status_code == 202
    until(client, lambda r: r["state"] == "done", "second")


def test_a_run_that_goes_while_it_is_asked_for_is_not_there(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    upload(client)
    until(client, lambda r: r["state"] == "done")
    known = runs.progress

    def late(storage: Path, *state: Any) -> Any:
        shutil.rmtree(storage, ignore_errors=True)
        (storage / "photographs").mkdir(parents=True)
        (storage / "config.json").write_text('{"subject": {"class": "dog"}}')
        return known(storage, *state)

    monkeypatch.setattr(runs, "progress", late)
    (tmp_path / "rex" / "news").touch()  # or it would be as it was read before
    assert client.get("/api/runs/rex").status_code == 404
