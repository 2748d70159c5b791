"""`python -m benchmarks` (make bench): whole runs against the 2023 notebook's flow and diffusers' script, then the loops alone.

All alternate, and a table has the medians: a shared machine is at times a third slower than a minute before, and a ratio of two single runs with it.
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

from benchmarks import loops
from benchmarks.peers import PEERS, Work
from raybooth.demo import photographs
from raybooth.mini import FOLDER

SIDE = 64
ROUNDS = 3


def raybooth_run(work: Work, storage: Path) -> dict[str, float]:
    """The whole command in a process of its own, as a user runs it, and the loop's rate from its manifest."""
    settings = {
        "prior.images": work.class_images,
        "finetune.steps": work.steps,
        "finetune.batch": work.batch,
        "finetune.log_every": 10,
        "generate.prompts": ["photo of {subject}"],
        "generate.images_per_prompt": work.pictures,
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
    """A whole run by `name`, in a process and a folder of its own."""
    if name == "raybooth":
        return raybooth_run(work, scratch)
    scratch.mkdir()
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(PEERS[name], work, scratch, SIDE).result()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder) / "photos")
        work = Work(FOLDER, Path(folder) / "photos")
        rounds = []
        for i in range(ROUNDS):
            rounds.append({name: measured(name, work, Path(folder) / f"{name}-{i}") for name in ("raybooth", *PEERS)})
            print(f"round {i + 1} of {ROUNDS}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
    rows = {n: {k: statistics.median(r[n][k] for r in rounds) for k in rounds[0][n]} for n in rounds[0]}
    ours = rows["raybooth"]
    print(f"\n{work.class_images} class images, {work.steps} steps of {work.batch} + {work.batch} rows, {work.pictures} pictures (the script draws none)\n")
    print("| | whole run, s | times raybooth's | loop, steps/s | raybooth's rate over it |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['total']:.0f} | {row['total'] / ours['total']:.2f} | {row['steps/s']:.2f} | {ours['steps/s'] / row['steps/s']:.2f} |")
        if "without reports" in row:
            print(f"| {name}, its reports left out | | | {row['without reports']:.2f} | {ours['steps/s'] / row['without reports']:.2f} |")
    loops.tables(ROUNDS)


if __name__ == "__main__":
    main()
