"""How far a run has come, read from what lies in its storage: manifests, work in progress, readings, its log. Nothing is kept beside it."""

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from raybooth.config import Config, load
from raybooth.disk import is_locked
from raybooth.drawing import SHEET
from raybooth.errors import RayboothError
from raybooth.families import family_of
from raybooth.manifest import CONFIG_FILE, read_manifest
from raybooth.workspace import LOCK

State = Literal["queued", "running", "done", "failed", "stopped"]
RUN_LOG = "run.log"
"""The output of a run that was started here; a storage without it was made elsewhere."""
MOST_READINGS = 400  # of the losses: more than a line on a page can show
SHOWN = {"class-images": 8, "checkpoint-images/*": 4, "output-images": 24}
"""Folders whose pictures are shown while a run goes on, and how many of each."""
OUTPUTS = {"instance-images": ".png", "class-images": ".png", "latents": ".safetensors", "output-images": ".png"}
"""What the stages make, to be counted."""


class Step(BaseModel):
    """One stage of a run, and how much of its work is done."""

    name: str
    done: int
    total: int


class Progress(BaseModel):
    """A run."""

    id: str
    class_: str = Field(serialization_alias="class")
    token: str
    state: State
    error: str | None = Field(description="what went wrong, and what to do")
    stage: str | None = Field(description="the one that is being worked on")
    stages: list[Step]
    step: int = Field(description="optimizer steps done, of `steps`")
    steps: int
    losses: list[tuple[int, float]] = Field(description="(step, loss), each a mean since the one before")
    seconds: float = Field(description="since it was last begun, till now or till its end")
    pictures: list[str] = Field(description="where to fetch the pictures there are by now")


def progress(storage: Path, state: State | None = None) -> Progress:
    """All that is known about the run in `storage`.

    Args:
        state: "queued" or "running", if the caller knows.

    Raises:
        RayboothError: if its configuration cannot be read.
    """
    config, error = load(storage / CONFIG_FILE), None
    if state is None:
        state, error = _state(storage)
    readings = _readings(storage)
    step = readings[-1][0] if readings else 0
    stages = _stages(storage, config, step)
    current = next((s.name for s in stages if s.done < s.total), None)
    return Progress(
        id=storage.name,
        class_=config.subject.class_name,
        token=config.subject.token,
        state=state,
        error=error,
        stage=current if state in ("queued", "running") else None,
        stages=stages,
        step=step,
        steps=config.finetune.steps,
        losses=readings[:: len(readings) // MOST_READINGS + 1],
        seconds=_seconds(storage, state),
        pictures=[f"/api/runs/{storage.name}/pictures/{name}?made={made}" for name, (made, _) in _pictures(storage).items()],
    )


def picture(storage: Path, name: str) -> bytes | None:
    """The bytes of a picture that Progress gives the address of; None for any other name, and for a picture that is gone."""
    for _ in range(2):  # between the look and the reading it may have moved into its place
        with contextlib.suppress(FileNotFoundError, KeyError):
            return _pictures(storage)[name][1].read_bytes()
    return None


def marks(storage: Path) -> dict[str, int]:
    """Modification times of what lies in a storage, by name: as long as they stay, so does the progress of a run that is over."""
    with os.scandir(storage) as entries:
        return {entry.name: entry.stat(follow_symlinks=False).st_mtime_ns for entry in entries}


def _pictures(storage: Path) -> dict[str, tuple[int, Path]]:
    """`checkpoint-images/0000100/photo-of-...png` -> when it was made (as a name may be used again) and where it lies."""
    found = {}
    for pattern, most in SHOWN.items():
        for folder in sorted(storage.glob(pattern)):
            for name, path in sorted(_files(folder, ".png").items())[:most]:
                with contextlib.suppress(FileNotFoundError):  # it has just moved in
                    found[f"{folder.relative_to(storage)}/{name}"] = path.stat().st_mtime_ns // 1_000_000, path
    return found


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    """Outputs of a stage, complete or in progress, by name."""
    found: dict[str, Path] = {}
    for place in [*folder.glob(".partial-*"), folder]:
        with contextlib.suppress(FileNotFoundError):  # it has just moved in
            found |= {p.name: p for p in place.iterdir() if p.suffix == suffix and not p.name.startswith(".") and p.name != SHEET}
    return found


def _stages(storage: Path, config: Config, step: int) -> list[Step]:
    subject = config.subject
    photographs = sum(1 for _ in (storage / "photographs").glob("*"))
    instances = photographs * (1 + subject.crops) * (1 + subject.flip)
    made = {name: len(_files(storage / name, suffix)) for name, suffix in OUTPUTS.items()}
    rows = [
        ("prepare", "instance-images", made["instance-images"], instances),
        ("class-images", "class-images", made["class-images"], config.prior.drawn),
        ("encode", "latents", made["latents"], instances + config.prior.drawn + 2 * _encodes_prompts(storage, config)),
        ("finetune", "fine-tuned-model", step, config.finetune.steps),
        ("generate", "output-images", made["output-images"], len(config.output_prompts) * config.generate.images_per_prompt),
    ]
    # Work in progress may be complete before it has moved in; what is finished is whole, whatever was expected.
    return [
        Step(name=name, done=total if read_manifest(storage / folder) else min(done, total - 1), total=total)
        for name, folder, done, total in rows if total
    ]  # fmt: skip


def _encodes_prompts(storage: Path, config: Config) -> bool:
    """Whether the two prompts are encoded beforehand. A guess as long as the base model is not there."""
    with contextlib.suppress(RayboothError):
        return family_of(storage / "base-model").has_frozen_encoders(config.finetune.text_encoder)
    return not config.finetune.text_encoder


def _state(storage: Path) -> tuple[State, str | None]:
    """The state of a run that this server is not working on, read from its storage, and what went wrong with it."""
    if is_locked(storage / LOCK):
        return "running", None
    if read_manifest(storage / "output-images"):
        return "done", None
    text = (storage / RUN_LOG).read_text(errors="replace")
    last = next((line.strip() for line in reversed(re.split(r"[\r\n]", text)) if line.strip()), "")
    if last.startswith("raybooth: stopped"):
        return "stopped", None
    if last.startswith("raybooth: "):
        return "failed", last.removeprefix("raybooth: ")
    return ("failed", last) if "Traceback (most recent call last)" in text else ("stopped", None)


def _readings(storage: Path) -> list[tuple[int, float]]:
    try:
        rows = [json.loads(line) for line in (storage / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []
    return [(row["step"], row["loss"]) for row in rows]


def _seconds(storage: Path, state: State) -> float:
    try:
        began = (storage / LOCK).stat().st_mtime
    except FileNotFoundError:
        return 0.0
    end = time.time() if state == "running" else (storage / RUN_LOG).stat().st_mtime
    return round(max(0.0, end - began), 1)
