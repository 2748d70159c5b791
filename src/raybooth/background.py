"""Work in the background of a training: uploads, so that a slow network does not hold up its steps."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs `work` in a thread of its own. All requests made while it is busy share one more run, which sees to what there is by then: nothing queues up."""

    def __init__(self, work: Callable[[], None], name: str):
        self.work, self.pool = work, ThreadPoolExecutor(1, thread_name_prefix=name)
        self.asked: list[Future[None]] = []

    def ask(self) -> None:
        """Request a run of the work, without waiting for it."""
        self.asked = [f for f in self.asked if not f.done() or f.exception()]
        if all(f.running() or f.done() for f in self.asked):
            self.asked.append(self.pool.submit(self.work))

    def check(self) -> None:
        """Raise the error of a finished run, if there was one."""
        for f in self.asked:
            if f.done():
                f.result()

    def wait(self) -> None:
        """Wait for all requested runs; raises the error of one that failed."""
        for f in self.asked:
            f.result()
