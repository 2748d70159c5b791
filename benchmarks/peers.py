"""The flows that raybooth is measured against, each written from its description, on the same work.

`notebook` is the 2023 notebook's: Ray Data drawing one picture a call with the base's own sampler at 50 steps; a Ray
Train loop over a Ray Dataset, executed anew every epoch, in which VAE and text encoder run at every step and every step
is reported (to a trainer told to poll every 0.1 s, or a report would take 2 s); one picture a call again. `script` is what
diffusers' train_dreambooth.py does: class pictures in batches of 4 at 50 steps, then the same per-step work without Ray, on
images that its loader opens and prompts that it tokenizes for every row of every step.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps

SCHEDULER: dict[str, Any] = {"skip_prk_steps": True}


@dataclass(frozen=True)
class Work:
    """The work that all are measured on: 64 class images, 120 steps of 2 + 2 rows, 6 pictures."""

    base: Path
    photos: Path
    class_images: int = 64
    steps: int = 120
    batch: int = 2
    pictures: int = 6
    lr: float = 1e-4


def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, **SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(images: list[Image.Image], side: int) -> torch.Tensor:
    array = np.stack([np.asarray(im.convert("RGB").resize((side, side))) for im in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


Pair = tuple[torch.Tensor, torch.Tensor]
"""(batch, 3, h, w) in [-1, 1]: pictures of the subject, and of the class."""


def at_random(instance: torch.Tensor, classes: torch.Tensor, batch: int) -> Iterator[Pair]:
    while True:
        yield instance[torch.randint(len(instance), (batch,))], classes[torch.randint(len(classes), (batch,))]


def loop(base: Path, pairs: Iterator[Pair], work: Work, scratch: Path, autocast: torch.dtype | None = None) -> Iterator[float]:
    """The peers' step: pixels through the VAE, 2B prompts through the text encoder, two chunks of the loss; at the end a pipeline in `scratch`."""
    pipe, noises = pipeline(base), DDPMScheduler.from_pretrained(base / "scheduler")
    vae, text, unet = pipe.vae, pipe.text_encoder.train(), pipe.unet.train()
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=work.lr)
    prompts = ["photo of unqtkn dog"] * work.batch + ["photo of a dog"] * work.batch
    tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    for step, pair in zip(range(work.steps), pairs, strict=False):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            with torch.no_grad():
                z = vae.encode(torch.cat(pair)).latent_dist.sample().float() * vae.config.scaling_factor
            noise, t = torch.randn_like(z), torch.randint(1000, (len(z),))
            out = unet(noises.add_noise(z, noise, t), t, text(tokens).last_hidden_state).sample.float()
        (a, b), (c, d) = out.chunk(2), noise.chunk(2)
        loss = F.mse_loss(a, c) + F.mse_loss(b, d)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item() if step % 10 == 0 else 0.0
    pipe.save_pretrained(scratch / "model")


def script(work: Work, scratch: Path, side: int) -> dict[str, float]:
    """Run diffusers' script: its seconds, and its steps per second."""
    began = time.monotonic()
    pipe, classes = pipeline(work.base), scratch / "class-images"
    classes.mkdir()
    for i in range(0, work.class_images, 4):
        for k, picture in enumerate(pipe(["photo of a dog"] * min(4, work.class_images - i), num_inference_steps=50).images):
            picture.save(classes / f"{i + k}.jpg")
    rows = _Rows(sorted(work.photos.iterdir()), sorted(classes.iterdir()), pipe.tokenizer, side)
    del pipe
    times = timed(loop(work.base, _loaded(rows, work.batch), work, scratch))
    return {"total": time.monotonic() - began, "steps/s": rate(times)}


@dataclass(frozen=True)
class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    instance: list[Path]
    classes: list[Path]
    tokenizer: Any
    side: int

    def __len__(self) -> int:
        return max(len(self.instance), len(self.classes))

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = {}
        for name, paths, prompt in (("instance", self.instance, "photo of unqtkn dog"), ("class", self.classes, "photo of a dog")):
            with Image.open(paths[i % len(paths)]) as picture:
                row[name] = pixels([ImageOps.exif_transpose(picture)], self.side)[0]
            row[f"{name}_tokens"] = self.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids[0]
        return row


def _loaded(rows: _Rows, batch: int) -> Iterator[Pair]:
    while True:
        for loaded in torch.utils.data.DataLoader(rows, batch, shuffle=True, drop_last=True):
            yield loaded["instance"], loaded["class"]


def timed(steps: Iterator[Any]) -> list[float]:
    return [time.monotonic() for _ in steps]


def rate(times: list[float], warm: int = 10) -> float:
    """Steps a second after the first `warm`."""
    return (len(times) - 1 - warm) / (times[-1] - times[warm])


class _OnePicture:
    def __init__(self, folder: str, draw: Callable[[StableDiffusionPipeline, str], Image.Image]):
        self.pipe, self.draw = pipeline(Path(folder)), draw

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"image": np.asarray(self.draw(self.pipe, row["prompt"]))}


def _draw_one(pipe: StableDiffusionPipeline, prompt: str) -> Image.Image:
    return pipe(prompt).images[0]


def _notebook_loop(config: dict[str, Any]) -> float:
    work: Work = config["work"]
    losses = loop(work.base, _epochs(work.batch), work, config["scratch"])
    return rate(timed(_reported(losses) if config["reports"] else losses))


def _epochs(batch: int) -> Iterator[Pair]:
    import ray.train

    shard = ray.train.get_dataset_shard("train")
    while True:
        for rows in shard.iter_torch_batches(batch_size=batch, drop_last=True):
            yield rows["instance"], rows["class"]


def _reported(losses: Iterator[float]) -> Iterator[float]:
    import ray.train

    for loss in losses:
        ray.train.report({"loss": loss})
        yield loss


def _dataset(work: Work, classes: Path, side: int) -> Any:
    """A dataset of pairs from folders of pictures: the instances repeated until there are as many as of the class, zipped, shuffled."""
    import ray.data

    def pictures(folder: Path, column: str) -> Any:
        def normalised(row: dict[str, Any]) -> dict[str, Any]:
            return {column: pixels([Image.fromarray(row["image"])], side)[0].numpy()}

        return ray.data.read_images(str(folder)).map(normalised)

    def repeated(rows: dict[str, Any]) -> dict[str, Any]:
        return {"instance": np.concatenate([rows["instance"]] * times)}

    times = -(-work.class_images // len(list(work.photos.iterdir())))
    instance = pictures(work.photos, "instance").map_batches(repeated, batch_size=None).limit(work.class_images)
    return instance.repartition(1).zip(pictures(classes, "class").repartition(1)).random_shuffle()


def notebook(work: Work, scratch: Path, side: int) -> dict[str, float]:
    """Run the notebook's flow: its seconds, its steps per second, and these without the reports (trained once more, not in the total)."""
    began = time.monotonic()
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray

    with ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR):
        import ray.data
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        def draw(folder: Path, prompts: list[str]) -> list[np.ndarray]:
            rows = ray.data.from_items([{"prompt": p} for p in prompts], override_num_blocks=4)
            done = rows.map(_OnePicture, fn_constructor_args=(str(folder), _draw_one), compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1)
            return [row["image"] for row in done.iter_rows()]

        def train(reports: bool) -> float:
            trainer = TorchTrainer(
                _notebook_loop,
                train_loop_config={"work": work, "scratch": scratch, "reports": reports},
                scaling_config=ScalingConfig(num_workers=1),
                run_config=RunConfig(name=f"notebook-{reports}", storage_path=str(scratch / "ray")),
                datasets={"train": _dataset(work, classes, side)},
            )
            return float(trainer.fit().return_value)  # type: ignore[arg-type]

        classes = scratch / "class-images"
        classes.mkdir()
        for i, picture in enumerate(draw(work.base, ["photo of a dog"] * work.class_images)):
            Image.fromarray(picture).save(classes / f"{i}.png")
        steps = train(reports=True)
        draw(scratch / "model", ["photo of unqtkn dog"] * work.pictures)
        total = time.monotonic() - began
        return {"total": total, "steps/s": steps, "without reports": train(reports=False)}


PEERS: dict[str, Callable[[Work, Path, int], dict[str, float]]] = {"diffusers' script": script, "2023 notebook": notebook}
