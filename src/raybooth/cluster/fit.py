"""One function on a group of workers under Ray Train, with live messages from the first of them."""

import contextlib
import json
import math
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from typing import Any

from raybooth.cluster import session
from raybooth.cluster.allocator import keep_freed_memory
from raybooth.cluster.failures import causes, last_line, own_errors
from raybooth.cluster.session import Resources, check_workers, import_quickly
from raybooth.errors import LESS_MEMORY, LOGS, RayboothError

Say = Callable[[dict[str, Any]], None]
Loop = Callable[["Group", Say], Any]
DDP: dict[str, Any] = {
    "find_unused_parameters": True,  # the last layers of some encoders (SDXL's, SD 3's) are never read: they have no gradients to wait for
    "gradient_as_bucket_view": True,  # or all gradients would be held twice
    "broadcast_buffers": False,  # before every pass: needless, as every worker has them from the beginning and none changes
}
"""The arguments of torch's DistributedDataParallel."""


class Group:
    """What a worker knows of its group: device, rank, size, how to wrap a module, how to sum over all and how to agree."""

    def __init__(self, threads: int) -> None:
        import ray.train
        import ray.train.torch
        import torch

        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
            keep_freed_memory()

    @property
    def where(self) -> str:
        """How many workers there are and on what, in words."""
        import torch

        threads = torch.get_num_threads()
        each = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"
        return f"{self.world} worker{'s' * (self.world > 1)} on {each}{' each' * (self.world > 1)}"

    def wrap(self, module: Any) -> Any:
        import ray.train.torch

        # Not wrapped where there is one worker; callers must not reach through it (`.module`).
        return ray.train.torch.prepare_model(module, move_to_device=False, parallel_strategy_kwargs=DDP)

    def total(self, value: Any) -> Any:
        if self.world > 1:
            import torch.distributed

            torch.distributed.all_reduce(value)
        return value

    def least(self, value: int) -> int:
        """The least of what the workers give; all wait for the last."""
        if self.world == 1:
            return value
        import torch

        found = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
        return int(found)


def run_group(make: Callable[[], Loop], *, workers: tuple[int, int], gpus_per_worker: float | None, retries: int, have: Resources, heard: Say) -> Any:
    """Run `make()(group, say)` on every worker and return what the first worker's returns. `heard` gets what that one says meanwhile.

    `workers` are the fewest and the most; between them Ray shrinks and grows the group, each time starting it anew.
    A group that has lost a worker is started again, up to `retries` times: the loop must go on from what it has saved.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from raybooth.cluster.trainer import Trainer

    fewest, most = workers
    each = check_workers(fewest, gpus_per_worker, have)
    threads = max(1, have.cpus // have.nodes // math.ceil(most / have.nodes))
    wanted = f"{fewest} worker{'s' * (fewest > 1)} (1 CPU{f' and {each:g} GPU' if each else ''} each)"
    with tempfile.TemporaryDirectory(prefix="raybooth-") as scratch, _Board(heard, wanted) as board:
        for attempt in range(retries + 1):
            board.waits_anew()
            trainer = Trainer(
                _in_worker,
                train_loop_config={"make": make, "board": board.name, "threads": threads},
                torch_config=TorchConfig(backend="nccl" if each else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=most if fewest == most else workers,
                    use_gpu=each > 0,
                    resources_per_worker={"CPU": 1, "GPU": each} if each else {"CPU": 1},
                    placement_strategy="PACK" if each else "SPREAD",  # GPUs talk faster within a machine; each machine has CPUs of its own
                ),
                # Ray's own retries would repeat mistakes too, three times over.
                run_config=RunConfig(name=f"finetune-{attempt}", storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
            )
            try:
                with own_errors(), place_given_back():
                    return trainer.fit().return_value
            except RayboothError:  # a mistake, and not a loss, although it breaks the others' connections
                raise
            except Exception as error:
                if (loss := _loss(error)) is None:
                    raise
                if attempt == retries:
                    raise RayboothError(
                        f"Fine-tuning lost a worker {retries + 1} time{'s' * (retries > 0)}, perhaps for lack of memory: look at {LOGS}. "
                        f"Of the last Ray says: {last_line(loss)} "
                        "The same command goes on from the last checkpoint, with fewer cluster.workers too where they share a machine. "
                        f"What needs less memory, in this order: {LESS_MEMORY}"
                    ) from error
                heard({"note": "a worker was lost, the group starts again"})
                if fewest < most:
                    _count_what_is_left()
    raise AssertionError


def _count_what_is_left() -> None:
    """Have Ray count anew what an elastic group may have, as it does every 20 seconds: until then the group would get a lost node, and wait a minute for it."""
    import ray
    from ray.exceptions import RayError

    with contextlib.suppress(RayError, ImportError, AttributeError, TypeError):  # on failure, or with a Ray that keeps it elsewhere, it takes the minute
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

        ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("", recompute=True), timeout=10)


def _loss(error: Exception) -> BaseException | None:
    """The error that shows the loss of a worker: it died, its node did, or all that failed found a connection closed. None for a mistake in a worker."""
    import ray.exceptions as ray_errors

    lost = (
        ray_errors.RayActorError, ray_errors.WorkerCrashedError, ray_errors.NodeDiedError, ray_errors.ObjectLostError,
        ray_errors.OutOfMemoryError,  # of the machine: Ray ends a worker before the system does
    )  # fmt: skip
    if died := next((e for e in causes(error) if isinstance(e, lost)), None):
        return died
    failures = [failure for e in causes(error) for failure in (getattr(e, "worker_failures", None) or {}).values()] or [error]
    # A mistake in one worker closes the others' connections: a worker was lost only if all of them failed that way.
    return failures[0] if all(any(_CONNECTION.search(str(e)) for e in causes(failure)) for failure in failures) else None


_CONNECTION = re.compile(r"\bgloo\b|\bNCCL\b", re.IGNORECASE)
"""Matches torch's messages about a connection between workers, which name its library."""


def _in_worker(config: dict[str, Any]) -> Any:
    import_quickly()
    group = Group(config["threads"])

    def say(word: dict[str, Any]) -> None:
        if group.rank == 0:
            from ray.experimental.internal_kv import _internal_kv_put

            _internal_kv_put(f"{time.time_ns():020d}", json.dumps(word), namespace=config["board"])

    return config["make"]()(group, say)


def _places() -> dict[str, str]:
    """The states, by id (hexadecimal), of the placement groups that this driver's job has asked for: PENDING, CREATED, REMOVED, ..."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # an id ends with its job's
    return {name: one["state"] for name, one in placement_group_table().items() if name.endswith(job)}


def _waits_for_a_place(before: Collection[str]) -> bool:
    """Whether no placement group but those of `before` has been created: Ray Train waits for one, or until there is enough to ask for, and says nothing."""
    return not any(state == "CREATED" for name, state in _places().items() if name not in before)


@contextlib.contextmanager
def place_given_back() -> Iterator[None]:
    """Give back the place of a group that fails or is interrupted, which ends its workers.

    Ray keeps the place for as long as the driver lives if a worker died as it started, and where Ray stays up, as after a notebook's
    `raybooth.connect()`, interrupted workers go on: the next group would wait for ever.
    """
    from ray import PlacementGroupID
    from ray.exceptions import RayError
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    before = _places()
    try:
        yield
    except BaseException:
        with contextlib.suppress(RayError):  # Ray itself is gone
            for name in _places().keys() - before.keys():
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
        raise


class _Board:
    """Carries the first worker's words to the driver while it runs, in the key-value store of Ray's head: an actor would be one more process to start.

    Before the first of them it also tells that a place is waited for.
    """

    def __init__(self, heard: Say, wanted: str):
        self.heard, self.wanted, self.over, self.name = heard, wanted, threading.Event(), f"raybooth-{uuid.uuid4().hex}"
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.waits_anew()

    def waits_anew(self) -> None:
        """Begin to wait anew, for a group that is about to be started."""
        self.told, self.began, self.before = False, time.monotonic(), set(_places())

    def __enter__(self) -> "_Board":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join(timeout=10)

    def _listen(self) -> None:
        from ray.exceptions import RayError
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

        last = False
        while not last:
            last = self.over.wait(0.3)  # once more after the end, for the last words
            with contextlib.suppress(RayError):  # the head is gone
                for key in sorted(_internal_kv_list("", namespace=self.name)):
                    self.told = True
                    self.heard(json.loads(_internal_kv_get(key, namespace=self.name)))
                    _internal_kv_del(key, namespace=self.name)
                if not self.told and time.monotonic() - self.began > session.PATIENCE and _waits_for_a_place(self.before):
                    self.told = True
                    self.heard({"note": session.no_place(self.wanted)})
