"""The verbs of the command line, and what each takes."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from raybooth import __version__

STAGE_VERBS = {
    "run": "prepare to generate: from photographs to a personalised model and its pictures",
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
        epilog="To begin: raybooth run --photos ./my-dog --class dog (or raybooth demo). 'raybooth VERB --help' says what each takes.",
    )
    top.add_argument("--version", action="version", version=f"raybooth {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in STAGE_VERBS.items():
        _settings(verbs.add_parser(verb, help=text, description=text))
    for verb, (text, options) in OTHER_VERBS.items():
        options(verbs.add_parser(verb, help=text, description=text))
    return top


def _settings(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "config",
        nargs="?",
        type=Path,
        help="TOML file, or a storage's config.json; without one the storage's own settings hold, but for a run with a new subject or base",
    )
    verb.add_argument("--photos", nargs="+", action="extend", metavar="SOURCE", help="folders, files, URLs, or hf://owner/dataset")
    verb.add_argument("--class", dest="class_name", metavar="WORD", help="what the subject is an instance of, such as dog")
    verb.add_argument("--token", metavar="WORD", help="the rare word that will name the subject, or auto (default: unqtkn)")
    verb.add_argument("--base", metavar="MODEL", help="hub repository, local folder, .safetensors checkpoint, or mini (default: CompVis/stable-diffusion-v1-4)")
    verb.add_argument("--storage", metavar="DIR", help="folder or URI of the run (default: raybooth-run)")
    verb.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting; may be repeated")


def _demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--storage", default="raybooth-demo", help="folder of the run (default: %(default)s)")
    demo.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting; may be repeated")


def _plan(plan: argparse.ArgumentParser) -> None:
    _settings(plan)
    plan.add_argument("--gpu", metavar="SIZE", help="memory of a GPU, such as 24GiB: does it fit?")


def _bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("what", choices=["mini", "dreambench"], help="ten drawn subjects on mini, or a copy of the paper's dataset")
    bench.add_argument("--subjects", type=Path, metavar="DIR", help="for dreambench: a folder of photographs a subject, and prompts_and_classes.txt")
    bench.add_argument("--base", metavar="MODEL", help="for dreambench (default: CompVis/stable-diffusion-v1-4)")
    bench.add_argument("--storage", default="raybooth-bench", help="folder of all runs (default: %(default)s)")
    bench.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting of all runs, but for those that a row is about"
    )


def _token(token: argparse.ArgumentParser) -> None:
    _settings(token)
    token.add_argument("--draw", action="store_true", help="draw each of them with the base model, into token-images/ in the storage")


def _export(export: argparse.ArgumentParser) -> None:
    _settings(export)
    export.add_argument("--to", required=True, choices=["diffusers", "lora", "kohya", "single-file", "hub"], help="its form")
    export.add_argument("--output", metavar="DIR", help="folder to write (default: exports/FORM in the storage)")
    export.add_argument("--rank", type=_rank, help="of a LoRA that is extracted from a full fine-tuning (default: 32)")
    export.add_argument("--repo", metavar="OWNER/NAME", help="repository to push to, for --to hub; a new one is private")


def _import(imported: argparse.ArgumentParser) -> None:
    imported.add_argument("lora", metavar="LORA", help=".safetensors file in diffusers', kohya's or PEFT's layout")
    _settings(imported)


def _serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("paths", nargs="+", metavar="PATH", help="storage of a run, .safetensors file of a LoRA, or a folder of either")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    serve.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys of which requests must carry one, one a line")
    serve.add_argument("--insecure", action="store_true", help="listen beyond this machine without keys")
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name under which it may be asked, such as a reverse proxy's")
    serve.add_argument("--timeout", type=_seconds, default=120.0, metavar="SECONDS", help="for a request, upload included (default: %(default)g)")
    serve.add_argument("--safety", choices=("on", "off"), default="on", help="the safety checker of the base, if it has one (default: %(default)s)")
    serve.add_argument("--replicas", metavar="N", help="how many draw at once, as 2 or 1-4 (default: up to one a GPU, or one a core for small models)")
    serve.add_argument("--base", metavar="MODEL", help="local folder or mini, where no run tells (default: the first run's)")
    serve.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting of the runs that are started from the page")
    serve.add_argument("--address", help="of a Ray cluster, 'auto' for the one this machine is in (default: start Ray here)")


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not 0 < float(text) <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not a time: give seconds, such as 300")
    return float(text)


def _rank(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a rank: give a number from 1 on, such as 32")
    return int(text)


def _none(_: argparse.ArgumentParser) -> None:
    """Add no options: the verb takes none."""


OTHER_VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("the whole way on mini, the embedded base model, with a drawn dog", _demo),
    "plan": ("what a run will need: parameters, memory, FLOPs, disk; without a GPU and without weights", _plan),
    "token": ("rare words of a base model, to name a subject by; subject.token = 'auto' takes the first", _token),
    "bench": ("the DreamBooth paper's protocol: many subjects, a table of scores", _bench),
    "export": ("the fine-tuned model for other programs: diffusers, ComfyUI, AUTOMATIC1111, Forge, the hub", _export),
    "import": ("draw with a LoRA that was made elsewhere", _import),
    "serve": ("draw over HTTP, in the shape of OpenAI's images API: many subjects, one base model", _serve),
    "doctor": ("what this machine has, and what to expect of it", _none),
}
