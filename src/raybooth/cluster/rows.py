"""A plain function over many rows, by Ray Data: a pool of actors on GPUs, of tasks on CPUs."""

import contextlib
import logging
import math
import pickle
import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

from raybooth.cluster import session
from raybooth.cluster.session import Resources, import_quickly
from raybooth.errors import LOGS, RayboothError

Row = dict[str, Any]
Work = Callable[[list[Row]], list[bytes]]
"""Rows in, one file's bytes out for each. Rows are dictionaries of strings, numbers and bytes."""
Make = Callable[[], Work]


_held: dict[tuple[bytes, int], Work] = {}
"""The work of this process, one at most: it holds a model."""


def _made(pickled: bytes, threads: int) -> Work:
    """The work, made once in a process; what it held before is dropped first, as there may be no room for two models."""
    work = _held.get((pickled, threads))
    if work is None:
        _held.clear()
        import_quickly()
        import torch

        torch.set_num_threads(threads)
        make: Make = pickle.loads(pickled)
        work = _held[pickled, threads] = make()
    return work


@contextlib.contextmanager
def _counted(board: str, rows: str, retries: int) -> Iterator[None]:
    """Count how many workers die over `rows`, in the key-value store of Ray's head: Ray Data would hand these on for ever.

    Raises:
        RayboothError: if more than `retries` workers have died over them.
    """
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

    died = int(_internal_kv_get(rows, namespace=board) or 0)
    if died > retries:
        raise RayboothError(
            f"The same pictures lost a worker {died} time{'s' * (died > 1)}, perhaps for lack of memory: look at {LOGS}. "
            "What needs less, in this order: fewer cluster.samplers where they share a machine, a smaller cluster.sample_batch, a smaller base.resolution."
        )
    _internal_kv_put(rows, str(died + 1), namespace=board)
    yield
    _internal_kv_del(rows, namespace=board)


def _worked(batch: dict[str, Any], pickled: bytes, threads: int, board: str, retries: int) -> dict[str, Any]:
    rows = [pickle.loads(r) for r in batch["row"]]
    told = ""
    try:
        with _counted(board, rows[0]["name"], retries):
            data = _made(pickled, threads)(rows)
    except RayboothError as error:  # handed back as a result: Ray Data keeps neither the type nor the message of what is raised
        data, told = [b""] * len(rows), str(error)
    return {"name": [r["name"] for r in rows], "data": data, "error": [told] * len(rows)}


class _Worker:
    """An actor: holds a GPU, and the model on it, for as long as there are rows."""

    def __init__(self, pickled: bytes, threads: int, board: str, retries: int):
        self.work = partial(_worked, pickled=pickled, threads=threads, board=board, retries=retries)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.work(batch)


class _Task(_Worker):
    """The same in a process that Ray keeps for later tasks, of later stages too: imports stay, the model goes after five idle seconds."""

    idle = threading.Timer(0, _held.clear)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        _Task.idle.cancel()
        done = super().__call__(batch)
        _Task.idle = threading.Timer(5, _held.clear)
        _Task.idle.daemon = True
        _Task.idle.start()
        return done


SMALL = 1 << 28  # bytes: of a smaller model every core may have a copy


def pool_size(blocks: int, have: Resources, asked: int | None, model_bytes: int) -> int:
    """How many actors or tasks run at once, unless `asked`: one per GPU; on CPUs one per core for small models, one per node for others."""
    if asked:
        return min(asked, blocks)
    if have.gpus:
        return min(have.gpus, blocks)
    return min(have.cpus if model_bytes < SMALL else have.nodes, blocks)


def threads_of(have: Resources, model_bytes: int) -> int:
    """Threads of one actor or task. The last bits of a picture depend on it, so it does not depend on how many of them there are."""
    return 1 if model_bytes < SMALL else max(1, have.cpus // have.nodes)


@contextlib.contextmanager
def _waiting_told(board: str, wanted: str, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Say what is waited for if no worker has begun within `PATIENCE`. It yields a function to call when there are results, which calls that off."""
    from ray.exceptions import RayError
    from ray.experimental.internal_kv import _internal_kv_list

    def look() -> None:
        with contextlib.suppress(RayError):
            if not _internal_kv_list("", namespace=board):
                say(session.no_place(wanted))

    timer = threading.Timer(session.PATIENCE, look)
    timer.daemon = True
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


def map_rows(
    make: Make, rows: list[Row], *, batch: int, have: Resources, retries: int, say: Callable[[str], None], samplers: int | None = None, model_bytes: int = 0
) -> Generator[tuple[str, bytes]]:  # fmt: skip
    """Yield (name, file's bytes) of every row as it is done, in no particular order.

    Each row has a `name`. `make` runs in the workers, once in each; it must be picklable, as a partial of a function is.
    `say` gets a sentence if Ray has no place for any of them yet.
    The rows of a worker that dies go to another, up to `retries` times.
    A caller that may stop before the last row must close it (`contextlib.closing`): until then Ray Data's thread goes on, even without Ray.

    Raises:
        RayboothError: as a worker has raised it, or if too many workers have died over the same rows.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
    from ray.data.block import BlockAccessor

    blocks = math.ceil(len(rows) / batch)
    size = pool_size(blocks, have, samplers, model_bytes)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    board = f"raybooth-{uuid.uuid4().hex}"
    args = (pickle.dumps(make), threads_of(have, model_bytes), board, retries)
    # Pickled: as columns, rows with different keys would be filled up with nulls.
    source = ray.data.from_items([{"row": pickle.dumps(r)} for r in rows], override_num_blocks=blocks)
    # Fractions of a CPU: workers that held all CPUs would starve Ray Data's own tasks, and the pipeline would hang.
    if have.gpus:
        pool = ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
        done = source.map_batches(_Worker, batch_size=batch, compute=pool, fn_constructor_args=args, num_gpus=1, num_cpus=0.5)
    else:
        done = source.map_batches(_Task(*args), batch_size=None, compute=TaskPoolStrategy(size=size), num_cpus=0.5)
    # Block by block, in this thread: iter_rows() reads ahead in three of its own, which outlive an interrupt and then call a Ray that is gone.
    wanted = "workers that draw, score or encode (1 GPU each)" if have.gpus else "workers that draw, score or encode (half a CPU each)"
    with _waiting_told(board, wanted, say) as begun:
        for bundle in done.iter_internal_ref_bundles():
            begun()
            for block in bundle.block_refs:
                for one in BlockAccessor.for_block(ray.get(block)).iter_rows(public_row_format=True):
                    if one["error"]:
                        raise RayboothError(one["error"])
                    yield one["name"], one["data"]
