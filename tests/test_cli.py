"""Which storage a command means, and what it goes by there."""

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from stored import make_run

import raybooth
from raybooth import config
from raybooth.base_model import model_configuration
from raybooth.cli import OTHER, config_of, main
from raybooth.demo import demo_config
from raybooth.errors import RayboothError
from raybooth.mini import FOLDER
from raybooth.options import parser
from raybooth.workspace import Workspace


def begun(storage: Path, steps: int) -> None:
    """What a run has left there as soon as it has begun."""
    made = config.load(None, [f"generate.steps={steps}"], subject={"class": "dog"})
    storage.mkdir(parents=True)
    (storage / "config.json").write_text(json.dumps(made.model_dump(by_alias=True, mode="json")))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of somebody who stands elsewhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    return home


@pytest.mark.parametrize("named", [["--storage=~/run"], ["--set=storage=~/run"], ["--storage=other", "--set", "storage='~/run'"]])
def test_a_stage_goes_by_the_settings_of_the_storage_that_is_named(home: Path, named: list[str]):
    begun(home / "run", 7)
    begun(Path("raybooth-run"), 9)
    made = config_of(parser().parse_args(["generate", *named]))
    assert (made.storage, made.generate.steps) == ("~/run", 7)
    assert config_of(parser().parse_args(["generate"])).generate.steps == 9


def test_run_goes_by_the_storage_if_it_is_told_no_subject_and_no_base(home: Path):
    begun(home / "run", 7)
    assert config_of(parser().parse_args(["run", "--storage=~/run"])).generate.steps == 7
    assert config_of(parser().parse_args(["run", "--storage=~/run", "--set=finetune.steps=800"])).generate.steps == 7
    usual = config.Config.model_fields["generate"].default.steps
    for told in (["--class=cat"], ["--class=cat", "--photos", "a"], ["--set=subject.class=cat"]):
        assert config_of(parser().parse_args(["run", "--storage=~/run", *told])).generate.steps == usual
    for told in (["--photos", "a"], ["--token=unq"], ["--base=mini"], ["--set=base.model=mini"], ["--storage=~/new"]):
        with pytest.raises(RayboothError, match=r"subject\.class is empty"):
            config_of(parser().parse_args(["run", "--storage=~/run", *told]))


def test_photographs_can_be_named_one_by_one(home: Path):
    made = config_of(parser().parse_args(["run", "--class=dog", "--photos", "a", "b", "--photos=c"]))
    assert made.subject.photos == ["a", "b", "c"]


def test_a_setting_that_is_text_is_not_counted_with(home: Path):
    begun(home / "123", 7)
    assert config_of(parser().parse_args(["generate", f"--set=storage={home}/123"])).generate.steps == 7
    begun(Path("1e3"), 8)
    assert config_of(parser().parse_args(["generate", "--set=storage=1e3"])).generate.steps == 8


@pytest.mark.parametrize("verb", [["report"], ["generate"], ["evaluate"], ["export", "--to=lora"]], ids=lambda v: v[0])
def test_a_storage_without_a_run_is_named_and_not_made(home: Path, capsys: pytest.CaptureFixture[str], verb: list[str]):
    assert main([*verb, "--storage=typo"]) == 2
    assert "There is no run in typo" in capsys.readouterr().err
    assert not Path("typo").exists()


def test_what_a_run_begins_with_needs_none(home: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["prepare", "--storage=new"]) == 2
    assert "subject.class is empty" in capsys.readouterr().err


def test_plan_and_demo_know_the_home_too(home: Path):
    prepared = home / "run" / "base-model"
    prepared.mkdir(parents=True)
    (prepared / "model_index.json").write_text("{}")
    assert model_configuration(config.load(None, ["storage=~/run"], subject={"class": "dog"})) == prepared
    assert demo_config("~/demo", []).subject.photos == [str(home / "demo" / "photographs")]


def test_plan_knows_what_was_prepared_for_a_remote_storage(home: Path):
    uri, model = "memory://planned/run", "owner/model"
    made = config.load(None, [f"storage={uri}"], subject={"class": "dog"}, base={"model": model})
    with pytest.raises(RayboothError, match="owner/model is not prepared in the storage memory://planned/run: run 'raybooth prepare' first"):
        model_configuration(made)
    stage = Workspace(uri).stage("base-model", {"repo": model, "revision": None})
    stage.write("model_index.json", b"{}")
    stage.finish({"source": model})
    assert model_configuration(made) == Workspace(uri).root / "base-model"


def test_a_plan_needs_no_class(home: Path, toy: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--base", str(toy), "--gpu", "24GiB"]) == 0
    assert "24GiB: fits" in capsys.readouterr().out


def test_export_takes_what_load_takes(home: Path):
    make_run(home / "run", FOLDER, 1)
    assert Path(raybooth.export("~/run", "lora")).is_relative_to(home / "run")
    fsspec.filesystem("memory").put(f"{home}/run/", "/exported/run/", recursive=True)
    assert list(Path(raybooth.export("memory://exported/run", "lora")).glob("*.safetensors"))
    for storage in ("memory://exported/typo", "~/typo"):
        with pytest.raises(RayboothError, match=f"There is no run in {storage}"):
            raybooth.export(storage, "lora")


@pytest.mark.parametrize(("storage", "named"), [("FILE", "is not a folder"), ("FILE/run", "is not a folder"), ("~nobody-of-this-name/x", "storage = '~nobody")])
def test_a_demo_without_a_place_says_so(storage: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").touch()
    assert main(["demo", "--storage", storage.replace("FILE", str(tmp_path / "file"))]) == 2
    assert named in capsys.readouterr().err


def test_a_demo_with_photographs_of_ones_own_draws_none_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from raybooth import verbs

    def stopped(run: object) -> None:
        raise RayboothError("stopped")

    monkeypatch.setitem(verbs.ALL, "prepare", stopped)
    own, storage = tmp_path / "own", tmp_path / "storage"
    own.mkdir()
    assert main(["demo", "--storage", str(storage), "--set", f"subject.photos={own}"]) == 2
    assert not [*own.iterdir(), *storage.glob("photographs/*")]
    assert main(["demo", "--storage", str(storage), "--set", "subject.photos=[]"]) == 2
    assert len([*storage.glob("photographs/*.png")]) == 5


def test_a_reader_that_leaves_is_no_error():
    """As `| head -1` does."""
    command = f"{sys.executable} -m raybooth plan --base mini --class dog | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_folder_that_may_not_be_entered_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def closed(_: object) -> None:
        raise PermissionError(13, "Permission denied", "/closed/x")

    monkeypatch.setitem(OTHER, "doctor", closed)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "raybooth: /closed/x cannot be reached (Permission denied): ask its owner for the right to, or give another path.\n"
