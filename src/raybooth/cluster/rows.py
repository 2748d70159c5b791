"""A plain function over many rows, by a pool of Ray Data actors."""

import logging
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

from raybooth.cluster.session import Resources, own_errors

Row = dict[str, Any]
Work = Callable[[list[Row]], list[bytes]]
"""Rows in, one file's bytes out for each. Rows are dictionaries of strings, numbers and bytes."""


class _Actor:
    """Makes the work once (it loads a model) and does it batch after batch."""

    def __init__(self, make: Callable[[], Work], threads: int):
        import torch

        torch.set_num_threads(threads)
        self.work = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [pickle.loads(r) for r in batch["row"]]
        return {"name": [r["name"] for r in rows], "data": self.work(rows)}


def pool_size(blocks: int, have: Resources, asked: int | None, model_bytes: int) -> int:
    """Actors: one a GPU; on CPUs one a core, as far as copies of the model stay below a quarter of a gigabyte each."""
    if asked:
        return min(asked, blocks)
    if have.gpus:
        return min(have.gpus, blocks)
    return min(have.cpus if model_bytes < 1 << 28 else have.nodes, blocks)


def map_rows(
    make: Callable[[], Work], rows: list[Row], *, batch: int, have: Resources, samplers: int | None = None, model_bytes: int = 0
) -> Iterator[tuple[str, bytes]]:
    """(name, file's bytes) of every row, as they are done and in no particular order.

    Each row has a `name`. `make` runs in the actors, once in each; it must be picklable, as a partial of a function is.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    blocks = math.ceil(len(rows) / batch)
    size = pool_size(blocks, have, samplers, model_bytes)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Fractions of a CPU: actors that held all CPUs would starve Ray Data's own tasks, and the pipeline would hang.
    share = {"num_gpus": 1, "num_cpus": 0.5} if have.gpus else {"num_cpus": 0.5}
    # Pickled: as columns, rows with different keys would be filled up with nulls.
    done = ray.data.from_items([{"row": pickle.dumps(r)} for r in rows], override_num_blocks=blocks).map_batches(
        _Actor,
        batch_size=None,
        compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(make, max(1, have.cpus // size)),
        **share,
    )
    with own_errors():
        for one in done.iter_rows():
            yield one["name"], one["data"]
