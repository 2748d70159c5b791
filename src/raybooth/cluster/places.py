"""The places that Ray Train's groups have in a cluster: Ray's placement groups."""

import contextlib
from collections.abc import Iterator
from typing import Any


def ours() -> dict[str, str]:
    """State by name (hexadecimal) of those that this driver's job has asked for: PENDING, CREATED, REMOVED, ..."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # a name ends with its job's
    return {name: one["state"] for name, one in placement_group_table().items() if name.endswith(job)}


@contextlib.contextmanager
def given_back(trainer: Any) -> Iterator[None]:
    """An interrupt ends the group of a trainer and its place: Ray keeps both for as long as this driver lives, and a notebook's lives on.

    `trainer.controller` is the actor that leads the group, None before it is there; the workers end with it.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.exceptions import RayError
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    before = ours()
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(RayError):  # Ray itself is away, and with it all that it kept
            if trainer.controller:
                ray.kill(trainer.controller)
            for name, state in ours().items():
                if name not in before and state != "REMOVED":
                    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
        raise
