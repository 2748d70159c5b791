"""Drawing behind Ray Serve: replicas of something that draws, as many as are needed, each replaced when it is lost."""

import asyncio
import contextlib
import logging
import pickle
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Protocol

from raybooth.cluster.failures import causes, last_line
from raybooth.cluster.rows import SMALL, threads_of
from raybooth.cluster.session import Resources, import_quickly
from raybooth.errors import RayboothError


class Draws(Protocol):
    """What a replica draws with."""

    def draw(self, job: Any) -> AsyncGenerator[Any, None]:
        """Results, each with an `identity` of its own: by it a caller knows those that it has seen before."""


class LostError(Exception):
    """No replica could do it: more is waiting than allowed, or too many were lost."""


class Drawer:
    """One replica: makes what draws, once, and hands out its results as they come."""

    def __init__(self, pickled: bytes, threads: int):
        import_quickly()
        import torch

        torch.set_num_threads(threads)
        self.made: Draws = pickle.loads(pickled)()

    async def draw(self, job: Any) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(self.made.draw(job)) as results:
            async for result in results:
                yield result

    def pid(self) -> int:
        import os

        return os.getpid()


def replica_range(have: Resources, model_bytes: int) -> tuple[int, int]:
    """The fewest replicas (1) and the most: one per GPU; on CPUs one per core for small models, one per node for others."""
    return 1, have.gpus or (have.cpus if model_bytes < SMALL else have.nodes)


@contextlib.contextmanager
def served(
    make: Callable[[], Draws], name: str, *, have: Resources, model_bytes: int, replicas: tuple[int, int], batch: int, queue: int, joined: bool
) -> Iterator["Served"]:
    """Replicas of what `make()` returns, for the length of the context; `make` must be picklable.

    Args:
        name: of the application. It replaces one of the same name, and leaves those of others on the cluster alone.
        replicas: fewest and most.
        batch: jobs that one replica can do together.
        queue: jobs that may wait for a replica.
        joined: whether the cluster outlives this.
    """
    from ray import serve

    _quieten()
    fewest, most = replicas
    deployment = serve.deployment(Drawer).options(
        name="Drawer",
        ray_actor_options={"num_gpus": 1, "num_cpus": 0.5} if have.gpus else {"num_cpus": 0.5},
        max_ongoing_requests=4 * batch,
        max_queued_requests=queue,
        autoscaling_config={"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": batch, "upscale_delay_s": 3, "downscale_delay_s": 120},
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    # None of Ray's proxies: they listen, and they read whole bodies before anybody can refuse them.
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
    try:
        try:
            handle = serve.run(deployment.bind(pickle.dumps(make), threads_of(have, model_bytes)), name=name, route_prefix=None)
        except RuntimeError as error:  # several tries have failed: the deployment knows why the last one did
            told = [d.message for d in serve.status().applications[name].deployments.values() if d.message]
            raise RayboothError(f"No replica can be made: {last_line(told[0] if told else error)}") from error
        try:
            yield Served(handle, name)
        finally:
            handle.shutdown()  # its thread counts what is waiting and reports it every 10 s, to a Ray that may be gone
    finally:
        if joined:
            serve.delete(name)


def _quieten() -> None:
    for logger in ("ray.serve", "ray.serve._private"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(_is_no_loss)


def _is_no_loss(record: logging.LogRecord) -> bool:
    """Whether a record is about anything but a lost replica: Serve forgets what it has asked of one, and asyncio would log that with a traceback."""
    from ray.exceptions import RayError

    return not (record.exc_info and isinstance(record.exc_info[1], RayError))


class Served:
    """Draws with whichever replica is free."""

    def __init__(self, handle: Any, name: str, retries: int = 3):
        self.name, self.retries = name, retries
        self.pids = handle.options(method_name="pid")
        self._draw = handle.options(method_name="draw", stream=True)

    async def draw(self, job: Any) -> AsyncGenerator[Any, None]:
        """A job's results. If a replica is lost, another draws the same ones again, and none is yielded twice.

        Raises:
            LostError: if no replica can do it now.
            RayboothError: as what draws has raised it.
        """
        seen = set()
        for attempt in range(self.retries + 1):
            answer = self._draw.remote(job)
            try:
                async for result in answer:
                    if result.identity not in seen:
                        seen.add(result.identity)
                        yield result
                return
            except Exception as error:
                self._explain(error, attempt)
                await asyncio.sleep(0.5)
            finally:
                answer.cancel()

    def _explain(self, error: Exception, attempt: int) -> None:
        """Raise the error as what it is, unless it is worth trying again."""
        import ray.exceptions as ray_errors
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        for cause in causes(error):
            if isinstance(cause, RayboothError):
                raise cause from None
            if isinstance(cause, BackPressureError | DeploymentUnavailableError):
                raise LostError("The server has more to draw than it can take.") from error
        lost = (ray_errors.RayActorError, ray_errors.WorkerCrashedError, ray_errors.NodeDiedError, ReplicaUnavailableError)
        if not any(isinstance(cause, lost) for cause in causes(error)):
            raise error
        if attempt == self.retries:
            raise LostError("The machines that draw were lost, several times.") from error

    async def healthy(self) -> bool:
        """Whether some replica is running."""
        from ray import serve

        try:
            status = (await asyncio.to_thread(serve.status)).applications[self.name]
        except Exception:  # the controller is gone
            return False
        return any(d.replica_states.get("RUNNING", 0) for d in status.deployments.values())
