"""The command line: a verb for each stage, for all together, and for what comes before and after. Nothing heavy is imported before it is needed."""

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.cluster.session import import_quickly
from raybooth.errors import RayboothError
from raybooth.options import parser

if TYPE_CHECKING:
    from raybooth.config import Config
    from raybooth.planning import Plan
    from raybooth.session import Run


STOPPED = 130
"""Exit status after Ctrl-C."""
FIRST = ("prepare", "plan", "token", "import")
"""Verbs besides `run` that a run may begin with: they need no storage that already holds one."""


def config_of(args: argparse.Namespace) -> "Config":
    """The configuration a verb was given: file, then options, then --set."""
    from raybooth import config
    from raybooth.sources import refuse_configurations

    refuse_configurations(args.photos or ())  # or its settings would seem to be ignored
    storage = _storage(args)
    subject = {"photos": args.photos, "token": args.token, "class": args.class_name}
    values = {
        "subject": {k: v for k, v in subject.items() if v is not None},
        "base": {"model": args.base} if args.base is not None else {},
        **({"storage": storage} if storage is not None else {}),
    }
    return config.load(args.config or _kept_config(args), args.set, **values)


def _storage(args: argparse.Namespace) -> str | None:
    """The storage that is named by --storage or --set, if any."""
    from raybooth.config import override

    named = [layer["storage"] for layer in map(override, args.set) if "storage" in layer]
    return str(named[-1]) if named else args.storage


def _kept_config(args: argparse.Namespace) -> Path | None:
    """The storage's own configuration, for a verb that was given no file; None where it is not needed and not there.

    It is needed unless the verb may begin a run, or is told the class, the one setting without a default. `run` begins anew if told of a subject or a base.
    """
    from raybooth.config import Config
    from raybooth.session import config_in, kept_config

    storage = _storage(args) or Config.model_fields["storage"].default
    said_whole = args.class_name is not None or any(override.startswith("subject.class") for override in args.set)
    begins = said_whole or args.photos or args.token or args.base or any(override.startswith(("subject.", "base.")) for override in args.set)
    if args.verb == "run" and begins:
        return None
    return kept_config(storage) if said_whole or args.verb in (*FIRST, "run") else config_in(storage)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for what the user can put right, 130 for Ctrl-C."""
    args = parser().parse_args(argv)
    _quieten()
    import_quickly()
    try:
        with _stopped_by(signal.SIGTERM):
            OTHER.get(args.verb, _run)(args)
    except RayboothError as error:
        return _refused(str(error))
    except PermissionError as error:  # of a path that was given, in a folder that this user may not enter
        if error.filename is None:
            raise
        return _refused(f"{error.filename} cannot be reached ({error.strerror}): ask its owner for the right to, or give another path.")
    except KeyboardInterrupt:
        print("\nraybooth: stopped. What was complete is kept; the same command goes on from there.", file=sys.stderr)
        return STOPPED
    return 0


def _refused(sentence: str) -> int:
    """Print what is wrong, on one line, and return the exit status for it."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", sentence)  # names and values may hold line breaks and terminal codes
    print(f"raybooth: {line}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _stopped_by(number: signal.Signals) -> Iterator[None]:
    """Treat the signal `number` like Ctrl-C: batch systems and containers send that instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _quieten() -> None:
    """Turn the libraries' own chatter off, unless it is asked for."""
    for key, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(key, value)


def _run(args: argparse.Namespace) -> None:
    config = config_of(args)
    from raybooth.session import Run
    from raybooth.stages import STAGES
    from raybooth.verbs import do

    with Run(config) as run:
        do(run, STAGES if args.verb == "run" else [args.verb])
        if args.verb == "run":
            _tell(run)


def _demo(args: argparse.Namespace) -> None:
    from raybooth.demo import demo

    demo(args.storage, args.set)


def _doctor(_: argparse.Namespace) -> None:
    from raybooth.doctor import report

    print(report())


def _serve(args: argparse.Namespace) -> None:
    from raybooth.serving.server import Options, serve

    given = {k: v for k, v in vars(args).items() if k not in ("verb", "safety")}
    serve(Options(**given, safety=args.safety == "on"))


def _config_of_a_model(args: argparse.Namespace) -> "Config":
    """The configuration as config_of() reads it, for verbs about a model, which need no class."""
    if not (args.config or _kept_config(args)):
        args.class_name = args.class_name or "subject"
    return config_of(args)


def _token(args: argparse.Namespace) -> None:
    config = _config_of_a_model(args)
    from raybooth import naming
    from raybooth.base_model import keep_base
    from raybooth.session import Run

    with Run(config) as run:
        keep_base(run)
        found = naming.proposals(run)
        print(naming.table(found))
        if args.draw:
            naming.draw_proposals(run, found)


def _bench(args: argparse.Namespace) -> None:
    from raybooth.bench import bench, root_of

    if args.what == "mini" and (args.subjects or args.base):
        raise RayboothError("bench mini has subjects and a base of its own: leave --subjects and --base out.")
    if args.what == "dreambench" and args.subjects is None:
        raise RayboothError("bench dreambench needs --subjects DIR: a copy of the DreamBooth dataset, with prompts_and_classes.txt.")
    if _storage(args) != args.storage:
        raise RayboothError("Each run of a bench has a storage of its own: give the folder of all with --storage, and not with --set.")
    root = root_of(args.storage)
    if args.what == "mini":
        from raybooth import minibench

        overrides = [*minibench.PROTOCOL, *args.set]
        print(bench(minibench.subjects_in(root), minibench.RECIPES, root, overrides, "mini", lambda: {minibench.PERFECT: minibench.perfect()}))
    else:
        from raybooth.dreambench import subjects_of

        print(bench(subjects_of(args.subjects), {"raybooth": []}, root, args.set, args.base, published=True))


def _export(args: argparse.Namespace) -> None:
    config = config_of(args)
    from raybooth.api import export

    export(config, args.to, args.output, args.rank, args.repo)


def _import(args: argparse.Namespace) -> None:
    config = config_of(args)
    from raybooth.api import import_lora

    import_lora(args.lora, config)


def _plan(args: argparse.Namespace) -> None:
    size = None if args.gpu is None else _bytes(args.gpu)
    config = _config_of_a_model(args)
    from raybooth.api import plan

    planned = plan(config)
    print(planned)
    if size is not None:
        trains, draws = (peak * 1.1 <= size for peak in (planned.peak, planned.drawing_peak))  # CUDA's context and fragmentation
        told = "fits" if trains and draws else f"does not fit: {_for_less_memory(config) if draws else _for_drawing(config, planned, size, trains)}"
        print(f"\n{args.gpu}: {told}")


def _for_drawing(config: "Config", planned: "Plan", size: int, trains: bool) -> str:
    what = "fine-tuning would, drawing would not" if trains else "neither fine-tuning nor drawing would"
    if planned.drawing["weights"] * 1.1 > size:
        return f"{what}; all parts of the model lie on the GPU for drawing: take a larger one, or a smaller model"
    return f"{what}; lower cluster.sample_batch, or base.resolution" + ("" if trains else f"; {_for_less_memory(config)}")


def _for_less_memory(config: "Config") -> str:
    """Advice on using less memory (as errors.LESS_MEMORY), without what is set already."""
    how, workers = config.finetune, config.workers[0]
    steps = {
        "lower finetune.batch": how.batch > workers,
        "raise finetune.accumulate": how.batch * (2 if config.prior.preserves else 1) > workers * how.accumulate,
        "set finetune.method = lora with finetune.lr = 1e-4": how.method != "lora",
        "set finetune.gradient_checkpointing": not how.gradient_checkpointing,
        "set finetune.optimizer = adamw8bit": how.method != "lora" and how.optimizer == "adamw" and not (how.channels_last or how.precision == "bf16-weights"),
        "take a lower base.resolution": True,
    }
    return ", or ".join(step for step, is_open in steps.items() if is_open)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(GiB|GB|G)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise RayboothError(f"--gpu {text} is not a size: write it as 24GiB.")
    return int(float(found[1]) * (10**9 if (found[2] or "").upper() == "GB" else 1 << 30))


def _tell(run: "Run") -> None:
    print(f"\npictures  {run.workspace.root / 'output-images'}\nmodel     {run.model_folder}  ({run.model_form})\nall       {run.config.storage}")
    print(f"one page  raybooth report --storage {shlex.quote(run.config.storage)}")


OTHER = {
    "demo": _demo, "plan": _plan, "token": _token, "bench": _bench, "export": _export, "import": _import, "serve": _serve, "doctor": _doctor,
}  # fmt: skip
"""The functions of the verbs that are not done by _run()."""
