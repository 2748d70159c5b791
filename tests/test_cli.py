"""Which storage a command means, and what it goes by there."""

from pathlib import Path

import pytest
from stored import make_run

import raybooth
from raybooth.cli import config_of, main
from raybooth.demo import demo_config
from raybooth.errors import RayboothError
from raybooth.mini import FOLDER
from raybooth.options import parser


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of somebody who has a run in it, and stands elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_run(tmp_path / "home" / "run", FOLDER, 1, ("generate.steps=7",))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


@pytest.mark.parametrize("named", [["--storage=~/run"], ["--set=storage=~/run"], ["--storage=other", "--set", "storage='~/run'"]])
def test_a_stage_goes_by_the_settings_of_the_storage_that_is_named(home: Path, named: list[str]):
    make_run(Path("raybooth-run"), FOLDER, 1, ("generate.steps=9",))
    made = config_of(parser().parse_args(["generate", *named]))
    assert (made.storage, made.generate.steps) == ("~/run", 7)
    assert config_of(parser().parse_args(["generate"])).generate.steps == 9


@pytest.mark.parametrize("verb", [["report"], ["generate"], ["evaluate"], ["export", "--to=lora"]], ids=lambda v: v[0])
def test_a_storage_without_a_run_is_named_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: list[str]):
    monkeypatch.chdir(tmp_path)
    assert main([*verb, "--storage=typo"]) == 2
    assert "There is no run in typo" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_run_begins_with_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--storage=new"]) == 2
    assert "subject.class is empty" in capsys.readouterr().err


def test_plan_and_demo_know_the_home_too(home: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--storage=~/run", "--base=owner/name"]) == 0
    assert demo_config("~/demo", []).subject.photos == [str(home / "demo" / "photographs")]


def test_export_takes_what_load_takes(home: Path):
    import fsspec

    assert Path(raybooth.export("~/run", "lora")).is_relative_to(home / "run")
    fsspec.filesystem("memory").put(f"{home}/run/", "/bucket/run/", recursive=True)
    assert list(Path(raybooth.export("memory://bucket/run", "lora")).glob("*.safetensors"))
    for storage in ("memory://bucket/typo", "~/typo"):
        with pytest.raises(RayboothError, match=f"There is no run in {storage}"):
            raybooth.export(storage, "lora")
