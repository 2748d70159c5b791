"""The flows that raybooth is measured against, each written from its description, on the same work.

`notebook` is the 2023 notebook's: Ray Data drawing one picture a call with the base's own sampler at 50 steps, a Ray
Train loop in which VAE and text encoder run at every step and every step is reported (to a trainer told to poll every
0.1 s, or a report would take 2 s), and one picture a call again. `script` is what diffusers'
train_dreambooth.py does: class pictures in batches of 4 at 50 steps, then the same per-step work without Ray.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image

SCHEDULER: dict[str, Any] = {"skip_prk_steps": True}


@dataclass(frozen=True)
class Work:
    """64 class images, 120 steps of 2 + 2 rows, 6 pictures: the size at which all are measured."""

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


def loop(base: Path, instance: torch.Tensor, classes: torch.Tensor, work: Work) -> Iterator[float]:
    """The peers' step: pixels through the VAE, 2B prompts through the text encoder, two chunks of the loss."""
    pipe, noises = pipeline(base), DDPMScheduler.from_pretrained(base / "scheduler")
    vae, text, unet = pipe.vae, pipe.text_encoder.train(), pipe.unet.train()
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=work.lr)
    prompts = ["photo of unqtkn dog"] * work.batch + ["photo of a dog"] * work.batch
    tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    for step in range(work.steps):
        picked = [torch.randint(len(x), (work.batch,)) for x in (instance, classes)]
        x = torch.cat([instance[picked[0]], classes[picked[1]]])
        with torch.no_grad():
            z = vae.encode(x).latent_dist.sample() * vae.config.scaling_factor
        noise, t = torch.randn_like(z), torch.randint(1000, (len(z),))
        out = unet(noises.add_noise(z, noise, t), t, text(tokens).last_hidden_state).sample
        (a, b), (c, d) = out.chunk(2), noise.chunk(2)
        loss = F.mse_loss(a, c) + F.mse_loss(b, d)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item() if step % 10 == 0 else 0.0
    pipe.save_pretrained(work.photos.parent / "peer-model")


def script(work: Work, side: int) -> dict[str, float]:
    """Seconds of diffusers' way, and its steps a second."""
    began = time.monotonic()
    pipe, drawn = pipeline(work.base), []
    for i in range(0, work.class_images, 4):
        drawn += pipe(["photo of a dog"] * min(4, work.class_images - i), num_inference_steps=50).images
    del pipe
    instance = pixels([Image.open(p) for p in sorted(work.photos.iterdir())], side)
    times = timed(loop(work.base, instance, pixels(drawn, side), work))
    return {"total": time.monotonic() - began, "steps/s": rate(times)}


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


def _notebook_loop(config: dict[str, Any]) -> dict[str, Any]:
    work: Work = config["work"]
    instance, classes = torch.from_numpy(config["instance"]), torch.from_numpy(config["classes"])
    return {"rate": rate(timed(_reported(loop(work.base, instance, classes, work))))}


def _reported(losses: Iterator[float]) -> Iterator[float]:
    import ray.train

    for loss in losses:
        ray.train.report({"loss": loss})
        yield loss


def notebook(work: Work, side: int) -> dict[str, float]:
    """Seconds of the notebook's way, and its steps a second."""
    from raybooth.cluster.session import connected

    began = time.monotonic()
    with connected(None):
        import ray.data
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        def draw(folder: Path, prompts: list[str]) -> list[np.ndarray]:
            rows = ray.data.from_items([{"prompt": p} for p in prompts], override_num_blocks=4)
            done = rows.map(_OnePicture, fn_constructor_args=(str(folder), _draw_one), compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1)
            return [row["image"] for row in done.iter_rows()]

        drawn = draw(work.base, ["photo of a dog"] * work.class_images)
        instance = pixels([Image.open(p) for p in sorted(work.photos.iterdir())], side)
        classes = pixels([Image.fromarray(d) for d in drawn], side)
        trainer = TorchTrainer(
            _notebook_loop,
            train_loop_config={"work": work, "instance": instance.numpy(), "classes": classes.numpy()},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="notebook", storage_path=str(work.photos.parent / "ray")),
        )
        steps = trainer.fit().return_value["rate"]
        draw(work.photos.parent / "peer-model", ["photo of unqtkn dog"] * work.pictures)
    return {"total": time.monotonic() - began, "steps/s": steps}
