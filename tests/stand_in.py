"""Stands in for `raybooth run`: the same folders, lock and last words, and nothing learnt. `python stand_in.py STORAGE`

A file `hold` beside the storage makes it wait in its fine-tuning. The class "failure" fails there, a "mule" does not hear Ctrl-C.
"""

import json
import signal
import sys
import time
from pathlib import Path

from PIL import Image

from raybooth.config import load
from raybooth.manifest import digest
from raybooth.pictures import png
from raybooth.workspace import Workspace


def run(storage: Path) -> None:
    config = load(storage / "config.json")
    workspace = Workspace(str(storage))
    photographs = sorted((storage / "photographs").iterdir())

    def made(stage: str, count: int, suffix: str = ".png") -> None:
        folder = workspace.stage(stage, {})
        for i in range(count):
            folder.write(f"{i:02d}{suffix}", png(Image.new("RGB", (16, 16), f"#{digest(i)[:6]}")))
            time.sleep(0.01)
        folder.finish({"pictures": [f"{i:02d}{suffix}" for i in range(count)]})

    with workspace.locked():
        made("base-model", 1, ".json")
        made("instance-images", len(photographs))
        made("class-images", config.prior.drawn)
        made("latents", len(photographs) + config.prior.drawn, ".safetensors")
        rows = []
        for step in range(10, config.finetune.steps + 1, 10):
            rows.append(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            (storage / "metrics.jsonl").write_text("".join(rows))
            while (storage.parent / "hold").exists():
                time.sleep(0.02)
            if config.subject.class_name == "failure":
                sys.exit("raybooth: The loss is not finite: lower finetune.lr.")
            time.sleep(0.01)
        made("checkpoint-images/0000100", 2)
        made("fine-tuned-model", 1, ".safetensors")
        made("output-images", 4)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if '"mule"' in (where / "config.json").read_text():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(where)
    except KeyboardInterrupt:
        sys.exit("\nraybooth: stopped. What was complete is kept; the same command goes on from there.")
