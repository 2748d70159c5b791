"""`raybooth.load`: the model of a run, to draw with, here and now, without Ray."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth import config as configuration
from raybooth.cluster.rows import threads_of
from raybooth.cluster.session import of_this_machine
from raybooth.disk import path_of
from raybooth.errors import RayboothError
from raybooth.manifest import CONFIG_FILE
from raybooth.pictures import contact_sheet, png
from raybooth.prompts import unknown_words
from raybooth.workspace import Workspace

if TYPE_CHECKING:
    from PIL.Image import Image


class Pictures(list["Image"]):
    """PIL images, which a notebook shows side by side."""

    def _repr_png_(self) -> bytes | None:
        side = max((image.width for image in self), default=0)
        return png(contact_sheet([("", list(self[i : i + 8])) for i in range(0, len(self), 8)], max(64, side))) if self else None


class Model:
    """A fine-tuned model in memory.

    Attributes:
        config: the run's configuration.
        digest: the digest of what draws, as pictures carry it.
    """

    def __init__(self, storage: str | Path):
        from raybooth.jobs import drawing_digest, opened, pipeline_stage, stage_folder
        from raybooth.sample import Sampler

        storage = str(storage)
        if "://" not in storage and not path_of(storage, "storage").is_dir():
            raise RayboothError(f"There is no storage {storage}: give the folder or URI of a finished run.")
        workspace = Workspace(storage)
        workspace.pull(CONFIG_FILE)
        self.digest = drawing_digest(workspace, "fine-tuned-model")
        self.config = configuration.load(workspace.root / CONFIG_FILE)
        pipeline = workspace.manifest(pipeline_stage(workspace, "fine-tuned-model"))
        self._threads = threads_of(of_this_machine(), sum(o["bytes"] for o in pipeline["outputs"].values()))
        family, loaded = opened(storage, "fine-tuned-model")
        how = self.config.generate
        resolution = self.config.base.resolution or family.facts(stage_folder(storage, "base-model")).resolution
        self._sampler = Sampler(family, loaded, family.sampling(how, resolution), self.config.cluster.sample_batch)

    def draw(self, prompt: str, n: int = 4, seed: int = 0, steps: int | None = None, guidance: float | None = None) -> Pictures:
        """`n` pictures of a prompt, in which {subject}, {token} and {class} are filled in; `info` of each holds prompt, seed and model.

        Picture k has the seed `seed` + k. Drawn with the same settings it is, to the bit, the picture that `raybooth generate` draws from that seed.

        Args:
            steps, guidance: default: the run's.
        """
        from PIL import Image

        if not isinstance(prompt, str):
            raise RayboothError(f"A prompt is a text, and {prompt!r} is none: draw several one after the other.")
        if unknown := unknown_words(prompt):
            raise RayboothError(f"The prompt '{prompt}' has a placeholder that is not known, {unknown[0]}: use {{subject}}, {{token}} or {{class}}.")
        sampler = self._sampler
        sampling, text = sampler.sampling.changed(steps, guidance), self.config.fill(prompt)
        for name, value, most in (("n", n, 10_000), ("steps", sampling.steps, 999)):
            if not isinstance(value, int) or not 1 <= value <= most:
                raise RayboothError(f"{name} = {value} is not possible: it is a whole number from 1 to {most}.")
        if not 0 <= sampling.guidance <= 100:
            raise RayboothError(f"guidance = {sampling.guidance} is not possible: it is a number from 0 to 100.")
        pictures, seeds = Pictures(), range(seed, seed + n)
        with _threads(self._threads):
            for start in range(0, n, sampler.batch):
                part: Sequence[int] = seeds[start : start + sampler.batch]
                for picture, own in zip(sampler.draw_batch([text] * len(part), part, sampling=sampling), part, strict=True):
                    image = Image.fromarray(picture)
                    image.info |= {"prompt": text, "seed": str(own), "model": self.digest}
                    pictures.append(image)
        return pictures


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """Let torch use `n` threads, as many as `raybooth generate` draws a picture with: its last bits depend on them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load(storage: str | Path) -> Model:
    """The fine-tuned model of a run, from its storage: `raybooth.load("my-run").draw("photo of {subject} in the snow", n=4, seed=0)`.

    Raises:
        RayboothError: if the storage holds no finished run.
    """
    return Model(storage)
