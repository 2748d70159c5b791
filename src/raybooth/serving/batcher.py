"""Gathers the pictures that many requests want into batches, the oldest first, and hands each its own. asyncio; no Ray, no HTTP."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from raybooth.errors import NotFiniteError, RayboothError
from raybooth.pictures import png
from raybooth.sections import Sampling
from raybooth.serving.engine import Engine, Look, Row

Unsafe = Callable[[list[Image.Image]], list[bool]]
"""Tells of each picture whether it must not be shown."""


@dataclass(frozen=True)
class Job:
    """What one request wants: a picture for each row.

    Attributes:
        partials: how many pictures in progress each row gets before the complete one.
        labelled: whether pictures carry prompt, seed and model as PNG text.
    """

    rows: tuple[Row, ...]
    sampling: Sampling
    partials: int = 0
    labelled: bool = True


@dataclass(frozen=True)
class Drawn:
    """A picture of row `row` as PNG, or None if the safety checker keeps it back.

    Attributes:
        partial: its number among the pictures in progress; None for a complete one.
        batch: how many were drawn together.
    """

    row: int
    png: bytes | None
    partial: int | None = None
    batch: int = 1

    @property
    def identity(self) -> tuple[int, int | None]:
        """Which of a job's pictures it is."""
        return self.row, self.partial


class AbandonedError(Exception):
    """Nobody waits for this batch any more."""


@dataclass(eq=False)
class _Place:
    """One row in the queue, and where its pictures go: Drawn, or what went wrong."""

    index: int
    row: Row
    job: Job
    key: tuple[Any, ...]
    most: int
    told: asyncio.Queue[Drawn | Exception]
    shown: dict[int, int]  # steps done -> number of the picture in progress that is due
    gone: bool = False


@dataclass
class Batcher:
    """The queue in front of an engine, which draws one batch at a time in a thread.

    Attributes:
        patience: seconds that a batch waits for company.
    """

    engine: Engine
    unsafe: Unsafe | None = None
    patience: float = 0.01
    waiting: list[_Place] = field(default_factory=list)
    _work: asyncio.Task[None] | None = None

    async def draw(self, job: Job) -> AsyncGenerator[Drawn, None]:
        """The job's pictures as they are ready. A caller that stops listening frees their places.

        Raises:
            RayboothError: if a subject cannot be loaded.
        """
        told: asyncio.Queue[Drawn | Exception] = asyncio.Queue()
        steps = job.sampling.steps
        due = [round(steps * (k + 1) / (job.partials + 1)) for k in range(job.partials)]
        shown = {step: k for k, step in enumerate(sorted({s for s in due if 0 < s < steps}))}
        places = []
        for i, row in enumerate(job.rows):
            group, most = self.engine.group(row)
            places.append(_Place(i, row, job, (group, job.sampling), most, told, shown))
        self.waiting += places
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._draw_all())
        try:
            left = len(places)
            while left:
                word = await told.get()
                if isinstance(word, Exception):
                    raise word
                left -= word.partial is None
                yield word
        finally:
            for place in places:
                place.gone = True
            self.waiting = [p for p in self.waiting if not p.gone]

    async def _draw_all(self) -> None:
        await asyncio.sleep(self.patience)
        while self.waiting:
            first = self.waiting[0]
            batch = [p for p in self.waiting if p.key == first.key][: first.most]
            self.waiting = [p for p in self.waiting if p not in batch]
            await self._draw_batch(batch)

    async def _draw_batch(self, batch: list[_Place]) -> None:
        loop = asyncio.get_running_loop()

        def tell(place: _Place, word: Drawn | Exception) -> None:
            loop.call_soon_threadsafe(place.told.put_nowait, word)

        try:
            await asyncio.to_thread(self._drawn, batch, tell)
        except AbandonedError:
            pass
        except Exception as error:
            for place in batch:
                place.told.put_nowait(error)

    def _drawn(self, batch: list[_Place], tell: Callable[[_Place, Drawn | Exception], None]) -> None:
        """Draw a batch, and tell each place its picture or error. Runs in a thread."""
        ready = []
        for place in batch:  # one that cannot be loaded is no reason for the others to fail
            try:
                self.engine.ready(place.row.subject)
                ready.append(place)
            except RayboothError as error:
                tell(place, error)

        def watch(done: int, look: Look) -> None:
            if all(p.gone for p in ready):
                raise AbandonedError
            due = [i for i, p in enumerate(ready) if done in p.shown and not p.gone]
            if due:
                self._hand_out([ready[i] for i in due], look(due), len(ready), done, tell)

        try:
            if ready:
                pictures = self.engine.draw([p.row for p in ready], ready[0].job.sampling, watch)
                self._hand_out(ready, pictures, len(ready), None, tell)
        except NotFiniteError as error:  # nor is one whose picture is not finite
            good = [place for i, place in enumerate(ready) if i not in error.rows]
            for place in set(ready) - set(good):
                tell(place, error)
            if good:
                self._hand_out(good, self.engine.draw([p.row for p in good], good[0].job.sampling), len(good), None, tell)

    def _hand_out(self, places: list[_Place], pictures: Any, together: int, done: int | None, tell: Callable[[_Place, Drawn], None]) -> None:
        images = [Image.fromarray(p) for p in pictures]
        kept_back = self.unsafe(images) if self.unsafe else [False] * len(images)
        for place, image, hidden in zip(places, images, kept_back, strict=True):
            if not (hidden and done is not None):
                data = None if hidden else _png(image, place)
                tell(place, Drawn(place.index, data, place.shown[done] if done is not None else None, together))


def _png(image: Image.Image, place: _Place) -> bytes:
    row = place.row
    return png(image, prompt=row.prompt, seed=str(row.seed), model=row.subject.drawn_by) if place.job.labelled else png(image)
