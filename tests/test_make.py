"""What `make` would do in an environment that is there already."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this machine")


def would_do(folder: Path, *asked: str, installed: str | None = None) -> str:
    """The commands of a target in a clone whose environment holds the build of torch that is `installed`."""
    (folder / ".venv").mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copyfile(ROOT / name, folder / name)
    if installed:
        (folder / ".venv" / f".installed-{installed}").touch()
    # `make test` hands its own flags on to the make here.
    surroundings = {name: value for name, value in os.environ.items() if name != "TORCH" and not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "--dry-run", *asked], cwd=folder, env=surroundings, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(("there", "asked"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_another_build_of_torch_takes_the_place_of_the_one_that_is_there(tmp_path: Path, there: str, asked: str):
    lines = would_do(tmp_path, "demo", f"TORCH={asked}", installed=there).splitlines()
    gone, new = (next(i for i, line in enumerate(lines) if part in line) for part in ("uninstall --quiet --yes torch", "'torch=="))
    assert gone < new
    assert ("whl/cpu" in lines[new]) == (asked == "cpu")
    assert f"touch .venv/.installed-{asked}" in lines


@pytest.mark.parametrize("there", ["cpu", "cuda"])
def test_without_a_word_the_build_that_is_there_stays(tmp_path: Path, there: str):
    (line,) = would_do(tmp_path, "test", installed=there).splitlines()
    assert line.startswith(".venv/bin/python -m pytest")


def test_a_new_environment_gets_the_cpu_build_and_loses_nothing(tmp_path: Path):
    said = would_do(tmp_path, "demo")
    assert "touch .venv/.installed-cpu" in said
    assert "uninstall" not in said
