"""`python -m benchmarks` (make bench): whole runs against the 2023 notebook's flow and diffusers' script, then the loops alone; ratios in one run."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import loops
from benchmarks.peers import Work, notebook, script
from raybooth.demo import photographs
from raybooth.mini import FOLDER

SIDE = 64


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


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        photographs(folder / "photos")
        work = Work(FOLDER, folder / "photos")
        rows = {"raybooth": raybooth_run(work, folder / "run"), "diffusers' script": script(work, SIDE), "2023 notebook": notebook(work, SIDE)}
    ours = rows["raybooth"]
    print(f"\n{work.class_images} class images, {work.steps} steps of {work.batch} + {work.batch} rows, {work.pictures} pictures (the script draws none)\n")
    print("| | whole run, s | times raybooth's | loop, steps/s | raybooth's rate over it |\n|---|---|---|---|---|")
    without = rows["2023 notebook"]["without reports"]
    for name, row in rows.items():
        print(f"| {name} | {row['total']:.0f} | {row['total'] / ours['total']:.2f} | {row['steps/s']:.2f} | {ours['steps/s'] / row['steps/s']:.2f} |")
    print(f"| 2023 notebook, its reports left out | | | {without:.2f} | {ours['steps/s'] / without:.2f} |")
    loops.tables()


if __name__ == "__main__":
    main()
