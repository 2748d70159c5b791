"""`python tests/three_nodes.py FOLDER PATTERN WORD ARGUMENTS...`: raybooth with ARGUMENTS on a cluster of three nodes on this machine.

As soon as PATTERN matches a file in FOLDER, a node that runs a process with WORD in its name is removed. Exits with raybooth's status.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster


def runs(node: Any, word: str) -> bool:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any(word in "".join(p.cmdline()) for p in raylet.children(recursive=True))


def main(folder: Path, pattern: str, word: str, arguments: list[str]) -> int:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    process = subprocess.Popen([sys.executable, "-m", "raybooth", *arguments, "--set", f"cluster.address={cluster.address}"])
    had = set(folder.glob(pattern))
    while set(folder.glob(pattern)) == had and process.poll() is None:
        time.sleep(0.02)
    victim = next((n for n in nodes if runs(n, word)), None)
    if process.poll() is not None or victim is None:
        print("it was over before a node could be removed", file=sys.stderr)
        return process.wait() or 3
    cluster.remove_node(victim, allow_graceful=False)
    status = process.wait()
    cluster.shutdown()
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
