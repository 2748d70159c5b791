"""`python tests/gaining_a_node.py FOLDER PATTERN ARGUMENTS...`: raybooth with ARGUMENTS on a cluster of one node on this machine.

As soon as PATTERN matches a file in FOLDER there is a second node. Exits with raybooth's status.
"""

import subprocess
import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from raybooth.cluster.fit import _count_what_is_left

# An elastic group looks for more every minute.
START = """
import functools, sys, ray.train
ray.train.ScalingConfig = functools.partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=1.0)
from raybooth.cli import main
sys.exit(main(sys.argv[1:]))
"""


def main(folder: Path, pattern: str, arguments: list[str]) -> int:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    process = subprocess.Popen([sys.executable, "-c", START, *arguments, "--set", f"cluster.address={cluster.address}"])
    while not list(folder.glob(pattern)) and process.poll() is None:
        time.sleep(0.02)
    cluster.add_node(num_cpus=1)
    with ray.init(cluster.address, log_to_driver=False):
        _count_what_is_left()  # Ray does every 20 seconds
        status = process.wait()
    cluster.shutdown()
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
