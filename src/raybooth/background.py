"""Work beside the steps of a training: uploads, which a slow network must not make them wait for."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """`work` in a thread of its own, once for all that ask while it is busy: it sees to what there is by then, and nothing queues up."""

    def __init__(self, work: Callable[[], None], name: str):
        self.work, self.pool = work, ThreadPoolExecutor(1, thread_name_prefix=name)
        self.asked: list[Future[None]] = []

    def ask(self) -> None:
        """Have it done, not waiting for it."""
        self.asked = [f for f in self.asked if not f.done() or f.exception()]
        if all(f.running() or f.done() for f in self.asked):
            self.asked.append(self.pool.submit(self.work))

    def check(self) -> None:
        """Raise what went wrong with what was done, if anything did."""
        for f in self.asked:
            if f.done():
                f.result()

    def wait(self) -> None:
        """For all that was asked; raises what went wrong with it."""
        for f in self.asked:
            f.result()
