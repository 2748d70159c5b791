"""Every verb that is a function of a run, by its name."""

from collections.abc import Iterable

from raybooth.base_model import refuse_other_base
from raybooth.evaluation import evaluate
from raybooth.naming import settle_token
from raybooth.reporting import report
from raybooth.session import Run
from raybooth.stages import STAGES, refuse_import

ALL = {**STAGES, "evaluate": evaluate, "report": report}


def do(run: Run, names: Iterable[str]) -> None:
    """Do the named verbs, in order. A whole run that asks much of a cluster looks for it first: a refused one changes nothing."""
    names = list(names)
    if "prepare" not in names:
        refuse_other_base(run)
    if "finetune" in names:
        refuse_import(run)
    if names[0] == "prepare" and len(names) > 1 and run.config.cluster.is_demanding:
        _ = run.ray
    for name in names:
        if name != "prepare":
            settle_token(run)
        ALL[name](run)
