"""The loop and the sampler by themselves, each in a process of its own, alternating, against the least that can be done.

`bare` trains the same modules on random tensors: forward, backward and optimizer step, nothing else, in both memory formats, in float32 and
in autocast to bfloat16: the fastest is the limit of the machine. `peers` is the step of the peers on images in memory: VAE and text encoder in
every step. A model is mini, or `layout`: Stable Diffusion 1.x with about 100 M random parameters in its UNet, at 256 px.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Work, at_random, loop, rate, timed
from raybooth.cluster import allocator
from raybooth.config import Sampling
from raybooth.families import Loaded, family_of
from raybooth.families.parts import load
from raybooth.log import peak_memory
from raybooth.mini import FOLDER


def layout(folder: Path) -> None:
    """A pipeline of SD 1.x's shape: about 100 M parameters in the UNet, 256 px; the text encoder and the VAE smaller in proportion."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    unet = UNet2DConditionModel(sample_size=32, block_out_channels=(112, 224, 448, 448), norm_num_groups=16, cross_attention_dim=256, attention_head_dim=8)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_num_groups=16, sample_size=256,
    )  # fmt: skip
    scheduler = DDIMScheduler.from_pretrained(FOLDER / "scheduler")
    StableDiffusionPipeline(vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False).save_pretrained(folder)


def _loaded(folder: Path, parts: tuple[str, ...]) -> Loaded:
    return load(family_of(folder), folder, parts)


def ours(folder: Path, steps: int, autocast: torch.dtype | None = None) -> Iterator[Any]:
    from raybooth.dataset import TrainingSet
    from raybooth.train import Settings, fit

    family = family_of(folder)
    loaded, rows = _loaded(folder, family.trainable(True)), 69
    shape = loaded.facts.latent_shape(loaded.facts.resolution)
    of_class = torch.arange(rows) >= 5
    data = TrainingSet(
        mean=torch.randn(rows, *shape), std=torch.rand(rows, *shape) / 10, prompt=of_class.int().tolist(), weight=torch.ones(rows),
        prompts=["photo of unqtkn dog", "photo of a dog"], instances=5,
    )  # fmt: skip
    lr = dict.fromkeys(family.trainable(True), 1e-4)
    settings = Settings(steps=steps, batch=2, lr=lr, weight_decay=1e-2, max_grad_norm=1.0, text_encoder=True, log_every=10, seed=0, autocast=autocast)
    return fit(family, loaded, data, settings)


def bare(folder: Path, steps: int, channels_last: bool = False, autocast: torch.dtype | None = None) -> Iterator[Any]:
    """4 rows of two prompts, as in `ours`."""
    family = family_of(folder)
    loaded = _loaded(folder, family.trainable(True))
    modules: Any = loaded.modules
    unet, text = modules["unet"].train().requires_grad_(True), modules["text_encoder"].train().requires_grad_(True)
    optimizer = torch.optim.AdamW([*unet.parameters(), *text.parameters()], lr=1e-4, fused=True)
    x = torch.randn(4, *loaded.facts.latent_shape(loaded.facts.resolution))
    target, t = torch.randn_like(x), torch.randint(1000, (4,))
    tokens = torch.randint(600, (2, text.config.max_position_embeddings))
    if channels_last:
        unet.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    for _ in range(steps):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = unet(x, t, text(tokens).last_hidden_state.repeat_interleave(2, 0)).sample.float()
        torch.nn.functional.mse_loss(out, target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield None


def peers(folder: Path, steps: int) -> Iterator[Any]:
    side = family_of(folder).facts(folder).resolution
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(folder, Path("none"), steps=steps)
        pictures = torch.rand(69, 3, side, side) * 2 - 1
        yield from loop(folder, at_random(pictures[:5], pictures[5:], work.batch), work, Path(scratch))


def draw_ours(folder: Path, pictures: int, steps: int, batch: int) -> None:
    from raybooth.sample import Sampler

    family = family_of(folder)
    loaded = _loaded(folder, (family.denoiser, "vae", *family.encoders))
    sampler = Sampler(family, loaded, Sampling(steps, 3.0, "dpmsolver++", loaded.facts.resolution), batch)
    _timed_draw(lambda n: list(sampler.draw(["photo of a dog"] * n, list(range(n)))), pictures, batch)


def draw_bare(folder: Path, pictures: int, steps: int, batch: int) -> None:
    """diffusers' own pipeline with the same sampler, `batch` pictures a call."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def draw(n: int) -> None:
        for _ in range(n // batch):
            pipe(["photo of a dog"] * batch, num_inference_steps=steps, guidance_scale=3.0)

    _timed_draw(draw, pictures, batch)


def _timed_draw(draw: Any, pictures: int, batch: int) -> None:
    draw(batch)
    began = time.monotonic()
    draw(pictures)
    _tell(pictures / (time.monotonic() - began))


def _tell(rate: float) -> None:
    print(json.dumps({"rate": rate, "peak": peak_memory()}))


PEERS = "the peers' step"
TRAINING: dict[str, Callable[[Path, int], Iterator[Any]]] = {
    "raybooth": ours,
    "bare": bare,
    "bare, channels_last": partial(bare, channels_last=True),
    PEERS: peers,
    "raybooth, bf16": partial(ours, autocast=torch.bfloat16),
    "bare, bf16": partial(bare, autocast=torch.bfloat16),
    "bare, bf16, channels_last": partial(bare, channels_last=True, autocast=torch.bfloat16),
}
DRAWING: dict[str, Callable[[Path, int, int], None]] = {
    "raybooth": partial(draw_ours, batch=4),
    "bare, batches of 4": partial(draw_bare, batch=4),
    "bare, one a call": partial(draw_bare, batch=1),
}
# Steps to train and how many of them are warming up; pictures to draw, and their denoising steps.
SIZE = {"mini": (60, 10, 32, 10), "layout": (8, 2, 4, 4)}


def _measured(kind: str, name: str, model: str, folder: Path) -> dict[str, float]:
    """In a new process, with the memory allocator that raybooth gives its workers; the peers' with the one that they have by themselves."""
    command = [sys.executable, "-m", "benchmarks.loops", kind, name, model, str(folder)]
    environment = os.environ if name == PEERS else {**os.environ, **allocator.environment()}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def tables(rounds: int) -> None:
    """Two tables a model, medians over `rounds`."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"mini": FOLDER, "layout": Path(scratch) / "layout"}
        layout(folders["layout"])
        for model, folder in folders.items():
            for kind, names, unit in (("train", TRAINING, "steps/s"), ("draw", DRAWING, "pictures/s")):
                runs = [{name: _measured(kind, name, model, folder) for name in names} for _ in range(rounds)]
                rows = {n: {k: statistics.median(r[n][k] for r in runs) for k in ("rate", "peak")} for n in names}
                print(f"\n| {model} | {unit} | raybooth's rate over it | peak memory, MB |\n|---|---|---|---|")
                for name, row in rows.items():
                    ratio = rows["raybooth, bf16" if "bf16" in name else "raybooth"]["rate"] / row["rate"]
                    print(f"| {name} | {row['rate']:.2f} | {ratio:.2f} | {row['peak'] / 1e6:.0f} |", flush=True)


def main(kind: str, name: str, model: str, folder: str) -> None:
    steps, warm, pictures, denoising = SIZE[model]
    if kind == "train":
        if name != PEERS:
            allocator.keep_freed_memory()
        _tell(rate(timed(TRAINING[name](Path(folder), steps)), warm))
    else:
        DRAWING[name](Path(folder), pictures, denoising)


if __name__ == "__main__":
    main(*sys.argv[1:])
