"""raybooth in Python: the verbs of the command line as functions of a configuration."""

import atexit
import contextlib
from collections.abc import Callable

from raybooth import reporting, stages
from raybooth.cluster.session import connected
from raybooth.config import Config
from raybooth.session import Run


def connect(address: str | None = None) -> None:
    """Start Ray, or join the cluster at `address`, for all calls that follow in this process: each would otherwise start its own, and wait for it."""
    held = contextlib.ExitStack()
    held.enter_context(connected(address))
    atexit.register(held.close)


def _verb(*names: str) -> Callable[[Config], Run]:
    def call(config: Config) -> Run:
        with Run(config) as made:
            for name in names:
                reporting.ALL[name](made)
        return made

    call.__doc__ = f"Do {', '.join(names)} for `config`, as far as it is not done. Returns the Run, whose `images()` are PIL pictures."
    return call


run = _verb(*stages.STAGES)
prepare = _verb("prepare")
class_images = _verb("class-images")
encode = _verb("encode")
finetune = _verb("finetune")
generate = _verb("generate")
evaluate = _verb("evaluate")
report = _verb("report")
