"""raybooth in Python: the verbs of the command line as functions of a configuration."""

import atexit
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth import evaluation, exporting, importing, naming, stages, verbs
from raybooth.base_model import keep_base, model_configuration
from raybooth.cluster.session import connected
from raybooth.config import Config, load
from raybooth.disk import path_of
from raybooth.session import Run, config_in

if TYPE_CHECKING:
    from raybooth.planning import Plan
    from raybooth.score import Score


def connect(address: str | None = None) -> None:
    """Start Ray, or join the cluster at `address`, for all calls that follow in this process: each would otherwise start its own, and wait for it."""
    held = contextlib.ExitStack()
    held.enter_context(connected(address))
    atexit.register(held.close)


Given = Config | str | Path
"""A configuration: a Config, the TOML or JSON file that holds it, or the storage (a folder or URI) of a run begun with it."""


def _config(given: Given) -> Config:
    if isinstance(given, Config):
        return given
    text = str(given)
    if "://" not in text and Path(text).suffix in (".toml", ".json"):
        return load(path_of(text, "The configuration"))
    return load(config_in(text), storage=text)


def _verb(*names: str) -> Callable[[Given], Run]:
    def call(config: Given) -> Run:
        with Run(_config(config)) as made:
            verbs.do(made, names)
        return made

    call.__doc__ = (
        f"Do {', '.join(names)}, as far as it is not done, for a Config, a TOML file, or the storage of a run. "
        "Returns the Run, whose `images()` are PIL pictures."
    )
    return call


run = _verb(*stages.STAGES)
prepare = _verb("prepare")
class_images = _verb("class-images")
encode = _verb("encode")
finetune = _verb("finetune")
generate = _verb("generate")
evaluate = _verb("evaluate")
report = _verb("report")


def scores(config: Given) -> dict[str, "Score"]:
    """The scores of a run that was evaluated, by name: "dino", "clip_i", "clip_t", "pres", "div", "class_div".

    Raises:
        RayboothError: if it was not evaluated.
    """
    with Run(_config(config), writes=False) as made:
        return evaluation.read(made)


def plan(config: Given) -> "Plan":
    """What a run of `config` will need, in bytes and FLOPs. Its base model must be in its storage (`prepare`), in a local folder, or mini.

    Raises:
        RayboothError: if the base model is not there, or cannot do what the configuration asks of it.
    """
    from raybooth import planning

    config = _config(config)
    return planning.plan(model_configuration(config), config)


def token(config: Given) -> list[dict[str, Any]]:
    """Rare words of the base model to name a subject by, the weakest first (families.tokens.Proposal); fetches the base as `prepare` does."""
    with Run(_config(config)) as made:
        keep_base(made)
        return naming.proposals(made)


def export(run: Given, to: str, output: str | Path | None = None, rank: int | None = None, repo: str | None = None) -> str:
    """Export the fine-tuned model of a run, given by its storage or configuration, as "diffusers", "lora", "kohya", "single-file" or "hub".

    Returns:
        The path of its folder, or the address of its repository.

    Raises:
        RayboothError: if there is no such run, or it is not complete, or its model cannot have that form.
    """
    with Run(_config(run), writes=output is None) as made:
        return exporting.export(made, to, output, rank, repo)


def import_lora(file: str | Path, config: Given) -> Run:
    """Take over a LoRA that was made elsewhere, for `config.base`: `generate(config)` then draws with it."""
    with Run(_config(config)) as made:
        importing.import_lora(made, file)
    return made
