"""A cluster of three nodes that loses one: in the middle of class images, and again in the middle of fine-tuning."""

import os
import subprocess
import sys
from pathlib import Path

from test_pipeline import LONGER as SETTINGS
from test_pipeline import apart, command, contents

WITHOUT = {"RAY_AUTH_MODE": "disabled", "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}


def lose_a_node(storage: Path, pattern: str, word: str, arguments: list[str]) -> str:
    script = Path(__file__).parent / "three_nodes.py"
    done = subprocess.run(
        [sys.executable, str(script), str(storage), pattern, word, *arguments], env=os.environ | WITHOUT, capture_output=True, text=True, timeout=500
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_the_result_is_the_same_when_nodes_go(tmp_path: Path, unbroken: Path, toy: Path, photos: Path):
    sets = {**SETTINGS, "cluster__samplers": 2}
    arguments = command("class-images", tmp_path, toy, photos, **sets)[3:]
    prepared = command("prepare", tmp_path, toy, photos, **sets)
    subprocess.run(prepared, check=True, capture_output=True)
    lose_a_node(tmp_path, "class-images/.partial-*/*.png", "ray::", arguments)
    assert contents(tmp_path / "class-images") == contents(unbroken / "class-images")
    said = lose_a_node(tmp_path, "checkpoints/[!.]*", "RayTrainWorker", command("run", tmp_path, toy, photos, **sets)[3:])
    assert "a worker was lost, the group starts again" in said
    assert "goes on from the checkpoint of step" in said
    # A worker of a node of one core steps with one thread: the last bits differ, nothing else.
    assert apart(tmp_path, unbroken) < 0.02
