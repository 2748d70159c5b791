"""Drawing behind Ray Serve: replicas of something that draws, as many as are needed, each put up again when it is lost."""

import asyncio
import contextlib
import logging
import pickle
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Protocol

from raybooth.cluster.rows import SMALL, threads_of
from raybooth.cluster.session import Resources, causes, import_quickly, last_line
from raybooth.errors import RayboothError


class Draws(Protocol):
    """What a replica is made of."""

    def draw(self, job: Any) -> AsyncGenerator[Any, None]:
        """Results, each under a key of its own: `identity` tells which of them a caller has seen before."""


class LostError(Exception):
    """No replica could do it: more waits than is allowed, or too many were lost."""


class Drawer:
    """One replica: makes what draws, once, and hands out what it says as it comes."""

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
    """Fewest and most: one a GPU; on CPUs one a core for small models, one a node for others."""
    return 1, have.gpus or (have.cpus if model_bytes < SMALL else have.nodes)


@contextlib.contextmanager
def served(
    make: Callable[[], Draws], name: str, *, have: Resources, model_bytes: int, replicas: tuple[int, int], batch: int, queue: int, joined: bool
) -> Iterator["Served"]:
    """Replicas of `make()`, which must be picklable, for as long as it lasts.

    Args:
        name: of the application. It takes the place of one of the same name, and leaves those of others that share the cluster alone.
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
    # No proxies of Ray's: they listen, and they read whole bodies before anybody can refuse them.
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
    try:
        try:
            handle = serve.run(deployment.bind(pickle.dumps(make), threads_of(have, model_bytes)), name=name, route_prefix=None)
        except RuntimeError as error:  # several tries have failed: why the last one did its deployment knows
            told = [d.message for d in serve.status().applications[name].deployments.values() if d.message]
            raise RayboothError(f"No replica can be made: {last_line(told[0] if told else error)}") from error
        try:
            yield Served(handle, name)
        finally:
            handle.shutdown()  # its thread counts what waits, and tells of it every 10 s, to a Ray that may have gone
    finally:
        if joined:
            serve.delete(name)


def _quieten() -> None:
    for logger in ("ray.serve", "ray.serve._private"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(_is_no_loss)


def _is_no_loss(record: logging.LogRecord) -> bool:
    """Serve asks its replicas how much they have to do, and forgets what it asked of one that is lost: asyncio would tell of that by a traceback."""
    from ray.exceptions import RayError

    return not (record.exc_info and isinstance(record.exc_info[1], RayError))


class Served:
    """Draws by whichever replica is free."""

    def __init__(self, handle: Any, name: str, retries: int = 3):
        self.name, self.retries = name, retries
        self.pids = handle.options(method_name="pid")
        self._draw = handle.options(method_name="draw", stream=True)

    async def draw(self, job: Any) -> AsyncGenerator[Any, None]:
        """A job's results. Those of a replica that is lost are drawn again by another, which gives the same, and none is said twice.

        Raises:
            LostError: if nobody can do it now.
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
        """Raise it as what it is, unless it is worth to try again."""
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
        """Whether there is a replica that runs."""
        from ray import serve

        try:
            status = (await asyncio.to_thread(serve.status)).applications[self.name]
        except Exception:  # the controller is away
            return False
        return any(d.replica_states.get("RUNNING", 0) for d in status.deployments.values())
