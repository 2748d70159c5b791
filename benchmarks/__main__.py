"""`python -m benchmarks` (make bench): whole runs against the 2023 notebook's flow and diffusers' script, then the loops alone.

Whole runs alternate, and the table has medians over the rounds, also of each round's ratios: a shared machine can be a third slower than a minute before.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import loops
from benchmarks.peers import PEERS, Work
from raybooth.demo import photographs
from raybooth.mini import FOLDER

SIDE = 64
ROUNDS = 3
SLOWLY = {f"{part}.{key}": value for part in ("prior", "generate") for key, value in {"scheduler": "pndm", "steps": 50, "guidance": 7.5}.items()}
RAYBOOTH: dict[str, dict[str, Any]] = {
    "raybooth": {}, "raybooth in float32": {"finetune.precision": "fp32"}, "raybooth, drawing as they do": {"finetune.precision": "fp32"} | SLOWLY,
}  # fmt: skip
"""raybooth with its defaults, in the precision of its peers, and with their sampler too."""


def raybooth_run(work: Work, storage: Path, how: dict[str, Any]) -> dict[str, float]:
    """Run the whole command in a process of its own, as a user does: its seconds, and the loop's rate from its manifest."""
    settings = {
        "prior.images": work.class_images,
        "prior.distill": False,  # the peers have no teacher to ask
        "finetune.steps": work.steps,
        "finetune.batch": work.batch,
        "finetune.log_every": 10,
        "finetune.checkpoint_every": work.steps,  # none on the way, as the peers
        "generate.prompts": ["photo of {subject}"],
        "generate.images_per_prompt": work.pictures,
        **how,
    }
    command = [sys.executable, "-m", "raybooth", "run", "--photos", str(work.photos), "--class", "dog", "--base", "mini", "--storage", str(storage)]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    began = time.monotonic()
    subprocess.run(command, check=True)
    total = time.monotonic() - began
    facts = json.loads((storage / "fine-tuned-model" / "manifest.json").read_text())["facts"]
    return {"total": total, "steps/s": facts["steps_per_second"]}


def measured(name: str, work: Work, scratch: Path) -> dict[str, float]:
    """The readings of a whole run by `name`, in a process and a folder of its own."""
    if name in RAYBOOTH:
        return raybooth_run(work, scratch, RAYBOOTH[name])
    scratch.mkdir()
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(PEERS[name], work, scratch, SIDE).result()


def _ratio(rounds: list[dict[str, dict[str, float]]], name: str, rate: str) -> str:
    """The ratio of raybooth's rate to that of `name`, in each round: the median, the least and the most."""
    ratios = [r["raybooth"]["steps/s"] / r[name][rate] for r in rounds]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder) / "photos")
        work = Work(FOLDER, Path(folder) / "photos")
        rounds = []
        for i in range(ROUNDS):
            rounds.append({name: measured(name, work, Path(folder) / f"{name}-{i}") for name in (*RAYBOOTH, *PEERS)})
            print(f"round {i + 1} of {ROUNDS}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
    print(f"\n{work.class_images} class images, {work.steps} steps of {work.batch} + {work.batch} rows, {work.pictures} pictures (the script draws none)\n")
    print("| | whole run, s | times raybooth's | loop, steps/s | raybooth's rate over it |\n|---|---|---|---|---|")
    for name, first in rounds[0].items():
        total, rate = (statistics.median(r[name][k] for r in rounds) for k in ("total", "steps/s"))
        longer = statistics.median(r[name]["total"] / r["raybooth"]["total"] for r in rounds)
        print(f"| {name} | {total:.0f} | {longer:.2f} | {rate:.2f} | {_ratio(rounds, name, 'steps/s')} |")
        if "without reports" in first:
            rate = statistics.median(r[name]["without reports"] for r in rounds)
            print(f"| {name}, its reports left out | | | {rate:.2f} | {_ratio(rounds, name, 'without reports')} |")
    loops.tables()


if __name__ == "__main__":
    main()
