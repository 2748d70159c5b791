"""The command line: one verb per stage, plus run, demo and doctor. Nothing heavy is imported before it is needed."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth import __version__
from raybooth.cluster.session import import_quickly
from raybooth.errors import RayboothError

if TYPE_CHECKING:
    from raybooth.config import Config

VERBS = {
    "run": "all stages: from photographs to a personalised model and its pictures",
    "prepare": "fetch the base model, turn the photographs into instance images",
    "class-images": "let the base model draw pictures of the class",
    "encode": "encode pictures and prompts for training",
    "finetune": "fine-tune the base model",
    "generate": "draw with the fine-tuned model",
    "evaluate": "score the pictures: the subject, the prompts, the class; before and after",
    "report": "one page of it all, report.html, that opens anywhere",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="raybooth",
        description="Five photographs in, a personalised Stable Diffusion model and its pictures out. The same command, run again, resumes.",
    )
    top.add_argument("--version", action="version", version=f"raybooth {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in VERBS.items():
        _settings(verbs.add_parser(verb, help=text, description=text))
    demo = verbs.add_parser("demo", help="the whole way on mini, the embedded base model, with a drawn dog")
    demo.add_argument("--storage", default="raybooth-demo", help="folder of the run (default: %(default)s)")
    demo.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting; may be repeated")
    plan = verbs.add_parser("plan", help="what a run will need: parameters, memory, FLOPs, disk; without a GPU and without weights")
    _settings(plan)
    plan.add_argument("--gpu", metavar="SIZE", help="memory of a GPU, such as 24GiB: does it fit?")
    token = verbs.add_parser("token", help="rare words of a base model, to name a subject by; subject.token = 'auto' takes the first")
    _settings(token)
    bench = verbs.add_parser("bench", help="the DreamBooth paper's protocol: many subjects, a table of scores")
    bench.add_argument("what", choices=["mini", "dreambench"], help="ten drawn subjects on mini, or a copy of the paper's dataset")
    bench.add_argument("--subjects", type=Path, metavar="DIR", help="for dreambench: a folder of photographs a subject, and prompts_and_classes.txt")
    bench.add_argument("--base", metavar="MODEL", help="for dreambench (default: CompVis/stable-diffusion-v1-4)")
    bench.add_argument("--storage", default="raybooth-bench", help="folder of all runs (default: %(default)s)")
    bench.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting of all runs; may be repeated")
    export = verbs.add_parser("export", help="the fine-tuned model for other programs: diffusers, ComfyUI, AUTOMATIC1111, Forge, the hub")
    _settings(export)
    export.add_argument("--to", required=True, choices=["diffusers", "lora", "kohya", "single-file", "hub"], help="its form")
    export.add_argument("--output", metavar="DIR", help="folder to write (default: exports/FORM in the storage)")
    export.add_argument("--rank", type=_rank, help="of a LoRA that is extracted from a full fine-tuning (default: 32)")
    export.add_argument("--repo", metavar="OWNER/NAME", help="repository to push to, for --to hub; a new one is private")
    imported = verbs.add_parser("import", help="draw with a LoRA that was made elsewhere")
    imported.add_argument("lora", type=Path, metavar="LORA", help=".safetensors file in diffusers', kohya's or PEFT's layout")
    _settings(imported)
    serve = verbs.add_parser("serve", help="draw over HTTP, in the shape of OpenAI's images API: many subjects, one base model")
    _serve_options(serve)
    verbs.add_parser("doctor", help="what this machine has, and what to expect of it")
    return top


def _settings(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", nargs="?", type=Path, help="TOML file; without one, the settings the storage was made with")
    verb.add_argument("--photos", nargs="+", metavar="SOURCE", help="folders, files, URLs, or hf://owner/dataset")
    verb.add_argument("--class", dest="class_name", metavar="WORD", help="what the subject is an instance of, such as dog")
    verb.add_argument("--token", metavar="WORD", help="the rare word that will name the subject (default: unqtkn)")
    verb.add_argument("--base", metavar="MODEL", help="hub repository, local folder, or mini (default: CompVis/stable-diffusion-v1-4)")
    verb.add_argument("--storage", metavar="DIR", help="folder or URI of the run (default: raybooth-run)")
    verb.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting; may be repeated")


def _serve_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("paths", nargs="+", metavar="PATH", help="storage of a run, .safetensors file of a LoRA, or a folder of either")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    serve.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys of which requests must carry one, one a line")
    serve.add_argument("--insecure", action="store_true", help="listen beyond this machine without keys")
    serve.add_argument("--safety", choices=("on", "off"), default="on", help="the safety checker of the base, if it has one (default: %(default)s)")
    serve.add_argument("--replicas", metavar="N", help="how many draw at once, as 2 or 1-4 (default: up to one a GPU, or one a core for small models)")
    serve.add_argument("--base", metavar="MODEL", help="local folder or mini, where no run tells (default: the first run's)")
    serve.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting of the runs that are started from the page")
    serve.add_argument("--address", help="of a Ray cluster, 'auto' for the one this machine is in (default: start Ray here)")


def config_of(args: argparse.Namespace) -> "Config":
    """The configuration a verb was given: file, then options, then --set."""
    from raybooth import config

    subject = {"photos": args.photos, "token": args.token, "class": args.class_name}
    values = {
        "subject": {k: v for k, v in subject.items() if v is not None},
        "base": {"model": args.base} if args.base is not None else {},
        **({"storage": args.storage} if args.storage is not None else {}),
    }
    path = args.config or _settings_of_storage(args)
    return config.load(path, args.set, **values)


def _settings_of_storage(args: argparse.Namespace) -> Path | None:
    """A single stage, given no file, goes by what the storage was made with."""
    path = Path(args.storage or "raybooth-run") / "config.json"
    return path if args.verb != "run" and path.exists() else None


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for what the user can put right, 130 for Ctrl-C."""
    args = parser().parse_args(argv)
    _quieten()
    import_quickly()
    try:
        if args.verb == "doctor":
            from raybooth.doctor import report

            print(report())
        elif args.verb == "demo":
            from raybooth.demo import demo

            demo(args.storage, args.set)
        elif args.verb == "plan":
            _plan(args)
        elif args.verb == "token":
            _token(args)
        elif args.verb == "bench":
            _bench(args)
        elif args.verb in ("export", "import"):
            _carry(args)
        elif args.verb == "serve":
            from raybooth.serving.server import Options, serve

            given = {k: v for k, v in vars(args).items() if k not in ("verb", "safety")}
            serve(Options(**given, safety=args.safety == "on"))
        else:
            _run(args)
    except RayboothError as error:
        print(f"raybooth: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nraybooth: stopped. What was complete is kept; the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def _quieten() -> None:
    """Libraries' own chatter off, unless asked for."""
    for key, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(key, value)


def _run(args: argparse.Namespace) -> None:
    config = config_of(args)
    from raybooth.reporting import do
    from raybooth.session import Run
    from raybooth.stages import STAGES

    with Run(config) as run:
        do(run, STAGES if args.verb == "run" else [args.verb])
        if args.verb == "run":
            _tell(run.workspace.root)


def _token(args: argparse.Namespace) -> None:
    if not _settings_of_storage(args):
        args.class_name = args.class_name or "subject"  # whose name is asked for
    config = config_of(args)
    from raybooth import naming
    from raybooth.base_model import prepare_base
    from raybooth.session import Run

    with Run(config) as run:
        prepare_base(run)
        print(naming.table(naming.proposals(run)))


def _bench(args: argparse.Namespace) -> None:
    from raybooth.bench import bench
    from raybooth.dreambench import subjects_of

    if args.what == "mini":
        from raybooth import minibench

        known = {minibench.PERFECT: minibench.perfect()}
        print(bench(minibench.subjects_in(Path(args.storage)), minibench.RECIPES, args.storage, args.set, "mini", known))
    elif args.subjects is None:
        raise RayboothError("bench dreambench needs --subjects DIR: a copy of the DreamBooth dataset, with prompts_and_classes.txt.")
    else:
        print(bench(subjects_of(args.subjects), {"raybooth": []}, args.storage, args.set, args.base))


def _carry(args: argparse.Namespace) -> None:
    """The model out to other programs, or a LoRA in from them."""
    config = config_of(args)
    from raybooth.exporting import export
    from raybooth.importing import import_lora
    from raybooth.session import Run

    with Run(config) as run:
        if args.verb == "import":
            import_lora(run, args.lora)
        else:
            export(run, args.to, args.output, args.rank, args.repo)


def _rank(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a rank: give a number from 1 on, such as 32")
    return int(text)


def _plan(args: argparse.Namespace) -> None:
    size = _bytes(args.gpu) if args.gpu else None
    config = config_of(args)
    from raybooth.base_model import model_configuration
    from raybooth.plan import plan

    planned = plan(model_configuration(config), config)
    print(planned)
    if size is not None:
        fits = planned.peak * 1.1 <= size  # CUDA's context and fragmentation
        print(f"\n{args.gpu}: {'fits' if fits else 'does not fit: lower finetune.batch, or set finetune.gradient_checkpointing or finetune.method = lora'}")


def _bytes(text: str) -> int:
    import re

    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GiB|GB|G)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise RayboothError(f"--gpu {text} is not a size: write it as 24GiB.")
    return int(float(found[1]) * (10**9 if (found[2] or "").upper() == "GB" else 1 << 30))


def _tell(root: Path) -> None:
    print(f"\npictures  {root / 'output-images'}\nmodel     {root / 'fine-tuned-model'}  (opens in plain diffusers)\nall       {root}")
