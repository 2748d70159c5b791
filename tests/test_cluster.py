"""A cluster that loses a node: in the middle of class images, and in the middle of fine-tuning, by a fixed group and an elastic one; one that
gains a node; and one of GPUs.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from test_pipeline import LONGER as SETTINGS
from test_pipeline import apart, command, contents
from test_resume import with_stages_before

WITHOUT = {"RAY_AUTH_MODE": "disabled", "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}


def on_a_cluster(script: str, *arguments: str) -> str:
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run(command, env=os.environ | WITHOUT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def lose_a_node(nodes: int, storage: Path, pattern: str, word: str, arguments: list[str]) -> str:
    return on_a_cluster("losing_a_node.py", str(nodes), str(storage), pattern, word, *arguments)


def test_the_result_is_the_same_when_nodes_go(tmp_path: Path, unbroken: Path, toy: Path, photos: Path):
    sets = {**SETTINGS, "cluster__samplers": 2}
    arguments = command("class-images", tmp_path, toy, photos, **sets)[3:]
    with_stages_before(unbroken, tmp_path)
    shutil.rmtree(tmp_path / "class-images")
    lose_a_node(3, tmp_path, "class-images/.partial-*/*.png", "ray::", arguments)
    assert contents(tmp_path / "class-images") == contents(unbroken / "class-images")
    said = lose_a_node(3, tmp_path, "checkpoints/[!.]*", "RayTrainWorker", command("finetune", tmp_path, toy, photos, **sets)[3:])
    assert "a worker was lost, the group starts again" in said
    assert "goes on from the checkpoint of step" in said
    # A worker of a node of one core steps with one thread: the last bits differ, nothing else.
    assert apart(tmp_path, unbroken) < 0.02


def test_an_elastic_group_goes_on_with_fewer(tmp_path: Path, unbroken: Path, toy: Path, photos: Path):
    """Two workers, a node each; then one, for there is no other node."""
    with_stages_before(unbroken, tmp_path)
    sets = {**SETTINGS, "cluster__workers": "1-2", "finetune__trackers": []}
    said = lose_a_node(2, tmp_path, "checkpoints/[!.]*", "RayTrainWorker", command("finetune", tmp_path, toy, photos, **sets)[3:])
    assert "2 nodes ran it" in said
    assert "a worker was lost, the group starts again" in said
    assert "goes on from the checkpoint of step" in said
    facts = json.loads((tmp_path / "fine-tuned-model" / "manifest.json").read_text())["facts"]
    assert facts["where"].startswith("1 worker on")
    assert apart(tmp_path, unbroken) < 0.02


def test_an_elastic_group_grows_with_the_cluster(tmp_path: Path, unbroken: Path, toy: Path, photos: Path):
    """One worker; then two, from the newest checkpoint on, for there is another node."""
    with_stages_before(unbroken, tmp_path)
    arguments = command("finetune", tmp_path, toy, photos, **SETTINGS, finetune__accumulate=2, cluster__workers="1-2")[3:]
    said = on_a_cluster("gaining_a_node.py", str(tmp_path), "checkpoints/[!.]*", *arguments)
    assert "goes on from the checkpoint of step" in said
    facts = json.loads((tmp_path / "fine-tuned-model" / "manifest.json").read_text())["facts"]
    assert facts["where"].startswith("2 workers on")
    assert apart(tmp_path, unbroken) < 0.02


def test_pictures_are_drawn_by_actors_where_there_are_gpus(tmp_path: Path, unbroken: Path, toy: Path, photos: Path):
    """Ray counts a GPU as it is told to, and torch, which finds none, draws on the CPU: the same pictures, by the way that GPUs go."""
    with_stages_before(unbroken, tmp_path)
    for stage in ("class-images", "latents"):
        shutil.rmtree(tmp_path / stage)
    arguments = command("VERB", tmp_path, toy, photos, cluster__gpus_per_worker=0, cluster__address="auto")[3:]
    start = """
import ray, sys
ray.init("local", num_gpus=1, include_dashboard=False)
from raybooth.cli import main
sys.exit(any(main([verb, *sys.argv[2:]]) for verb in ("class-images", "encode")))
"""
    done = subprocess.run([sys.executable, "-c", start, *arguments], env=os.environ | WITHOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("class-images", "latents"):
        assert contents(tmp_path / stage) == contents(unbroken / stage)


def test_a_group_on_cpus_takes_a_machine_for_each_worker(tmp_path: Path):
    """Ray would put both on one, and leave the other's CPUs idle."""
    start = """
import sys, ray, torch
from pathlib import Path
from ray.cluster_utils import Cluster
from raybooth.cluster.fit import run_group
from raybooth.cluster.session import Resources

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
cluster.add_node(num_cpus=2)
ray.init(cluster.address, log_to_driver=False)

def loop(group, say):
    Path(folder, str(group.rank)).write_text(f"{ray.get_runtime_context().get_node_id()} {torch.get_num_threads()}")

folder = sys.argv[1]
run_group(lambda: loop, workers=(2, 2), gpus_per_worker=None, retries=0, have=Resources(4, 0, 2), heard=print)
"""
    done = subprocess.run([sys.executable, "-c", start, str(tmp_path)], env=os.environ | WITHOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert first[0] != second[0]
    assert first[1] == second[1] == "2"
