"""`python tests/losing_a_node.py NODES FOLDER PATTERN WORD ARGUMENTS...`: raybooth with ARGUMENTS on a cluster of NODES nodes on this machine.

As soon as PATTERN matches a file in FOLDER, a node that runs a process with WORD in its name is removed; how many did is said. Exits with
raybooth's status.
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


def main(count: int, folder: Path, pattern: str, word: str, arguments: list[str]) -> int:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(wait=False, num_cpus=1) for _ in range(count)]
    cluster.wait_for_nodes()
    process = subprocess.Popen([sys.executable, "-m", "raybooth", *arguments, "--set", f"cluster.address={cluster.address}"])
    had = set(folder.glob(pattern))
    while set(folder.glob(pattern)) == had and process.poll() is None:
        time.sleep(0.02)
    busy = [n for n in nodes if runs(n, word)]
    print(f"{len(busy)} nodes ran it", file=sys.stderr)
    if process.poll() is not None or not busy:
        print("it was over before a node could be removed", file=sys.stderr)
        return process.wait() or 3
    cluster.remove_node(busy[0], allow_graceful=False)
    status = process.wait()
    cluster.shutdown()
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:]))
