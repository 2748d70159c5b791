"""Ray, started once for all stages or joined, and the resources that it has."""

import contextlib
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from raybooth.cluster.start import LOOPBACK, prepare_import, start
from raybooth.errors import RayboothError

PATIENCE = 30.0
"""Seconds until a message says that Ray has no place for some work: Ray itself waits and says nothing."""


@dataclass(frozen=True)
class Resources:
    """What Ray has; `here` if it was started on this machine alone. `machines`: CPUs and GPUs of each."""

    cpus: int
    gpus: int
    nodes: int
    here: bool = True
    machines: tuple[tuple[int, int], ...] = ()


def of_this_machine() -> Resources:
    """The CPUs that Ray would have if started here, without GPUs; it counts those that a container is given."""
    from ray._private.utils import get_num_cpus

    return Resources(max(1, int(get_num_cpus(override_docker_cpu_warning=True))), 0, 1)


def import_quickly() -> None:
    """Collect garbage less often. Call it first in a process: of the time that torch, diffusers and transformers take to import, a fifth is collection."""
    gc.set_threshold(20_000)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Resources]:
    """Ray for the length of a run: joined at `address`, started on this machine, or as it already runs.

    Raises:
        RayboothError: if no cluster answers at `address`.
    """
    prepare_import(address)
    import ray

    ours = not ray.is_initialized()
    if ours:
        start(address)
    try:
        have = ray.cluster_resources()
        # Ray also lists nodes that are gone, and heads that do no work.
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        head = nodes[0]["NodeManagerAddress"] if len(nodes) == 1 else ""
        machines = tuple((int(n["Resources"]["CPU"]), int(n["Resources"].get("GPU", 0))) for n in nodes)
        yield Resources(max(1, int(have.get("CPU", 1))), int(have.get("GPU", 0)), max(1, len(nodes)), head == LOOPBACK, machines)
    finally:
        if ours:
            _wait_for_ray_data()
            ray.shutdown()


def _wait_for_ray_data() -> None:
    """Wait for Ray Data's threads. After Ctrl-C it gives its loop two seconds to end, and a loop that calls a Ray that is gone ends the process silently."""
    for thread in threading.enumerate():
        if thread.name.startswith(("StreamingExecutor", "ray-data")):
            thread.join(timeout=10)


def no_place(wanted: str) -> str:
    """A sentence that says what waits for a place, and what the cluster has."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    there = " and ".join(f"{have.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU") if kind == "CPU" or have.get(kind))
    return f"Ray has no place for {wanted} yet: the cluster has {there}; they start when there is one"


def check_workers(workers: int, gpus_per_worker: float | None, have: Resources) -> float:
    """The number of GPUs that each worker gets.

    Raises:
        RayboothError: if there are not enough GPUs or CPUs for that many workers.
    """
    each = gpus_per_worker if gpus_per_worker is not None else float(have.gpus > 0)
    if workers * each > have.gpus:
        raise RayboothError(
            f"cluster.workers = {workers} with cluster.gpus_per_worker = {each:g} needs {workers * each:g} GPUs and there are {have.gpus}: "
            "ask for fewer workers, or set cluster.gpus_per_worker = 0 to run on CPUs."
        )
    places = sum(min(cpus, int(gpus / each)) for cpus, gpus in have.machines) if each else have.cpus
    if each and have.machines and workers > places:
        raise RayboothError(
            f"cluster.workers = {workers} with cluster.gpus_per_worker = {each:g} needs a CPU and {each:g} GPU{'s' * (each > 1)} on one machine for each, and "
            f"the machines there are have room for {places}: ask for fewer workers, or for fewer GPUs each."
        )
    if not each and workers > have.cpus:
        raise RayboothError(f"cluster.workers = {workers} needs as many CPUs and there are {have.cpus}: ask for fewer workers.")
    return each
