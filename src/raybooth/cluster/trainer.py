"""Ray Train's trainer as a run needs it: with its controller in this process, and with an end where Ray would begin anew for ever."""

import asyncio
import contextlib
from typing import Any
from unittest import mock

import ray
from ray.exceptions import RayActorError
from ray.runtime_context import RuntimeContext
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from raybooth.cluster.session import causes

UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Callbacks that start a process each: the splitting of datasets, and the watch over placement groups, which end with the driver."""


class Trainer(TorchTrainer):
    controller: Any = None
    """The actor, if it is one."""

    def _initialize_and_run_controller(self, **how: Any) -> Any:
        how["failure_policy"] = Policy(self.run_config.failure_config)
        if asyncio._get_running_loop() is None:
            return _controlled_here(how)
        try:  # as in a notebook's cell
            return super()._initialize_and_run_controller(**how)
        except KeyboardInterrupt:
            self._end_the_controller()
            raise

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's own ends the process with status 1; KeyboardInterrupt ends the run as it does in every stage."""
        self.controller = controller

    def _end_the_controller(self) -> None:
        """Or it would go on to start workers, where Ray stays."""
        with contextlib.suppress(ray.exceptions.RayError):  # what is asked of it afterwards fails when it has ended
            if self.controller:
                ray.kill(self.controller)
                ray.get(self.controller.get_result.remote(), timeout=10)

    def _create_default_callbacks(self) -> Any:
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in UNUSED]


class Policy(DefaultFailurePolicy):
    """A worker that dies as it starts is a lost worker: Ray counts it to the controller's failures, and tries those without end."""

    def make_decision(self, training_failed_error: Any) -> Any:
        found = list(causes(training_failed_error))
        died = any(isinstance(e, WorkerGroupStartupFailedError) for e in found) and any(isinstance(e, RayActorError) for e in found)
        return FailureDecision.RAISE if died else super().make_decision(training_failed_error)


def _controlled_here(how: dict[str, Any]) -> Any:
    """Ray Train's controller, which starts the workers and looks after them, in this process.

    Ray makes it an actor: one more process that imports torch before the workers may start theirs, four seconds of a run on two cores.
    """
    controller, loop = TrainController(**how), asyncio.new_event_loop()
    # Workers are handed the actor, for reports, of which there are none here.
    with contextlib.closing(loop), mock.patch.object(RuntimeContext, "current_actor", None):
        loop.run_until_complete(controller.run())
    return controller.get_result()
