"""The images API with something in place of its models: coloured squares, for every run under a folder that is done."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, FastAPI
from PIL import Image

from raybooth.config import load
from raybooth.manifest import digest, read_manifest
from raybooth.pictures import png
from raybooth.sections import Sampling
from raybooth.serving.api import create_app
from raybooth.serving.batcher import Drawn, Job
from raybooth.serving.engine import Row
from raybooth.serving.generations import UnavailableError
from raybooth.serving.static import PAGE
from raybooth.serving.subjects import Subject

SAMPLING = Sampling(20, 3.0, "ddim", 16)


@dataclass
class Found:
    """In place of Subjects, whose models must be models."""

    root: Path

    def found(self) -> dict[str, Subject]:
        base = Subject("base", "base", self.root, self.root, "base", "base", SAMPLING, 4, 0)
        done = [s for s in sorted(self.root.iterdir()) if read_manifest(s / "fine-tuned-model")]
        return {"base": base} | {s.name: self._of(s, i) for i, s in enumerate(done)}

    def _of(self, storage: Path, created: int) -> Subject:
        subject = load(storage / "config.json").subject
        photographs = tuple(sorted((storage / "photographs").iterdir()))
        about = {"token": subject.token, "class_name": subject.class_name, "photographs": photographs}
        return Subject(storage.name, "lora", storage, self.root, "base", storage.name, SAMPLING, 4, created, 16, **about)  # type: ignore[arg-type]


class Easel:
    """Draws. `asked` holds the jobs; the next `busy` are refused; each picture in progress takes `slow` seconds."""

    def __init__(self) -> None:
        self.asked: list[Job] = []
        self.busy, self.slow = 0, 0.0

    @property
    def rows(self) -> list[Row]:
        return sorted((row for job in self.asked for row in job.rows), key=lambda r: (r.seed, r.subject.id == "base"))

    async def draw(self, job: Job) -> AsyncIterator[Drawn]:
        if self.busy:
            self.busy -= 1
            raise UnavailableError("Nobody draws just now.")
        self.asked.append(job)
        for k in range(job.partials):
            for i in range(len(job.rows)):
                yield Drawn(i, square("#888"), k)
            await asyncio.sleep(self.slow)
        for i, row in enumerate(job.rows):
            yield Drawn(i, square(colour_of(row)))


def app(root: Path, easel: Easel, runs: APIRouter, keys: Sequence[str] = ()) -> FastAPI:
    return create_app(Found(root), easel.draw, keys=keys, routers=[runs], page=PAGE)  # type: ignore[arg-type]


def colour_of(row: Row) -> str:
    return f"#{digest([row.subject.id, row.prompt, row.seed])[:6]}"


def square(colour: str) -> bytes:
    return png(Image.new("RGB", (16, 16), colour))
