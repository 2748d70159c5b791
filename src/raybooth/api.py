"""raybooth in Python: the verbs of the command line as functions of a configuration."""

from collections.abc import Callable

from raybooth import reporting, stages
from raybooth.config import Config
from raybooth.session import Run


def _verb(*names: str) -> Callable[[Config], Run]:
    def call(config: Config) -> Run:
        with Run(config) as made:
            reporting.do(made, names)
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
