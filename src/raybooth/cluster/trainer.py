"""Ray Train's trainer as a run needs it: with its controller in this process, and an end where Ray would start again for ever."""

import asyncio
import contextlib
import time
from typing import Any
from unittest import mock

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayActorError
from ray.runtime_context import RuntimeContext
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from raybooth.cluster.failures import causes

UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Callbacks that start a process each: to split datasets, and to watch over placement groups, which end with the driver."""

SETTLED = 5.0
"""Seconds within which Ray gets back the resources of workers that have ended."""


class Trainer(TorchTrainer):
    controller: Any = None
    """The controller's actor, if it runs in one."""

    def _initialize_and_run_controller(self, **how: Any) -> Any:
        how["failure_policy"] = Policy(self.run_config.failure_config)
        if self.scaling_config.elasticity_enabled:
            how["scaling_policy"] = Elastic(self.scaling_config)
        if asyncio._get_running_loop() is None:
            return _controlled_here(how)
        try:  # inside a running event loop, as in a notebook's cell
            return super()._initialize_and_run_controller(**how)
        except KeyboardInterrupt:
            self._end_the_controller()
            raise

    def _register_sigint_handler(self, controller: Any) -> None:
        """Keep the actor, and install no handler: Ray's own ends the process with status 1, KeyboardInterrupt ends the run as it does in every stage."""
        self.controller = controller

    def _end_the_controller(self) -> None:
        """End the controller's actor: where Ray stays up, it would go on to start workers."""
        with contextlib.suppress(ray.exceptions.RayError):  # the last call fails once it has ended
            if self.controller:
                ray.kill(self.controller)
                ray.get(self.controller.get_result.remote(), timeout=10)

    def _create_default_callbacks(self) -> Any:
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in UNUSED]


class Policy(DefaultFailurePolicy):
    """Takes a worker that dies as it starts for a lost worker: Ray counts it among the controller's failures, and retries those without end."""

    def make_decision(self, training_failed_error: Any) -> Any:
        found = list(causes(training_failed_error))
        died = any(isinstance(e, WorkerGroupStartupFailedError) for e in found) and any(isinstance(e, RayActorError) for e in found)
        return FailureDecision.RAISE if died else super().make_decision(training_failed_error)


class Elastic(ElasticScalingPolicy):
    """Grows only into what is free: Ray's own policy goes by all that there is, whoever uses it, and waits for a place of that size for ever."""

    def __init__(self, scaling_config: Any):
        super().__init__(scaling_config)
        self._running, self._began = 0, time.monotonic()

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._running = 0
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._running = worker_group_state.num_workers
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        there = super()._count_possible_workers(reserved_resources)
        fit = self._running + super()._count_possible_workers(available_resources_per_node())
        if fit < there and not self._running and time.monotonic() - self._began < SETTLED:
            return 0  # the resources of a group that has just ended are coming back
        return min(there, fit)


def _controlled_here(how: dict[str, Any]) -> Any:
    """Run Ray Train's controller, which starts the workers and looks after them, in this process, and return its result.

    Ray would make it an actor: one more process that imports torch before the workers can start, four seconds of a run on two cores.
    """
    controller, loop = TrainController(**how), asyncio.new_event_loop()
    # Workers are handed the actor for their reports, and here they make none.
    with contextlib.closing(loop), mock.patch.object(RuntimeContext, "current_actor", None):
        loop.run_until_complete(controller.run())
    return controller.get_result()
