"""The loop and the sampler by themselves against the least that can be done, each in a process of its own, in turns of a few steps.

All processes are there at once and one of them works: a shared machine changes its speed within seconds, which then affects all of them alike.

`bare` trains the same modules on random tensors: forward, backward and optimizer step, nothing else, in both memory formats, in float32 and
in autocast to bfloat16: the fastest is the limit of the machine. `peers` is the peers' step on images in memory: VAE and text encoder in
every step. A model is mini, or `layout`: Stable Diffusion 1.x with about 100 M random parameters in its UNet, at 256 px.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Work, at_random, loop
from raybooth.cluster import allocator
from raybooth.families import Loaded, family_of
from raybooth.families.parts import load
from raybooth.log import peak_memory
from raybooth.mini import FOLDER
from raybooth.sections import Finetune, Sampling


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


def ours(folder: Path, steps: int, autocast: torch.dtype | None = None, teacher: bool = False) -> Iterator[Any]:
    from raybooth.dataset import TrainingSet
    from raybooth.train import Settings, fit

    family = family_of(folder)
    loaded, rows = _loaded(folder, family.trainable(True)), 69
    shape = loaded.facts.latent_shape(loaded.facts.resolution)
    of_class = torch.arange(rows) >= 5
    data = TrainingSet(
        mean=torch.randn(rows, *shape), std=torch.rand(rows, *shape) / 10, prompt=of_class.int().tolist(), weight=torch.ones(rows),
        prompts=["photo of unqtkn dog", "photo of a dog"], instances=5, teacher=teacher,
    )  # fmt: skip
    return fit(family, loaded, data, Settings(Finetune(steps=steps, batch=2, lr=1e-4, log_every=10), 0, autocast))


def bare(folder: Path, steps: int, channels_last: bool = False, autocast: torch.dtype | None = None) -> Iterator[Any]:
    """Train the bare modules on 4 rows of two prompts, as in `ours`."""
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


def peers(folder: Path, steps: int, autocast: torch.dtype | None = None) -> Iterator[Any]:
    side = family_of(folder).facts(folder).resolution
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(folder, Path("none"), steps=steps)
        pictures = torch.rand(69, 3, side, side) * 2 - 1
        yield from loop(folder, at_random(pictures[:5], pictures[5:], work.batch), work, Path(scratch), autocast)


def draw_ours(folder: Path, steps: int, pictures: int, batch: int = 4) -> Iterator[Any]:
    from raybooth.sample import Sampler

    family = family_of(folder)
    loaded = _loaded(folder, (family.denoiser, "vae", *family.encoders))
    sampler = Sampler(family, loaded, Sampling(steps, 3.0, "dpmsolver++", loaded.facts.resolution), batch)
    while True:
        yield list(sampler.draw(["photo of a dog"] * pictures, list(range(pictures))))


def draw_bare(folder: Path, steps: int, pictures: int, batch: int) -> Iterator[Any]:
    """diffusers' own pipeline with the same sampler, `batch` pictures a call."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    while True:
        yield [pipe(["photo of a dog"] * batch, num_inference_steps=steps, guidance_scale=3.0) for _ in range(pictures // batch)]


PEERS = "the peers' step"
ENDLESS = 1 << 20
Made = Callable[[Path], Iterator[Any]]


def _training(autocast: torch.dtype | None) -> dict[str, Made]:
    return {
        "raybooth": partial(ours, steps=ENDLESS, autocast=autocast),
        "raybooth, prior.distill": partial(ours, steps=ENDLESS, autocast=autocast, teacher=True),
        "bare": partial(bare, steps=ENDLESS, autocast=autocast),
        "bare, channels_last": partial(bare, steps=ENDLESS, channels_last=True, autocast=autocast),
        PEERS: partial(peers, steps=ENDLESS, autocast=autocast),
    }


def _drawing(pictures: int, steps: int) -> dict[str, Made]:
    return {
        "raybooth": partial(draw_ours, steps=steps, pictures=pictures),
        "bare, batches of 4": partial(draw_bare, steps=steps, pictures=pictures, batch=4),
        "bare, one a call": partial(draw_bare, steps=steps, pictures=pictures, batch=1),
    }


@dataclass(frozen=True)
class Group:
    """Ways that take turns. A turn is `each` steps (or calls of a drawing, of `things` pictures), after `warm` of them."""

    unit: str
    made: dict[str, Made]
    each: int
    warm: int
    turns: int
    things: int = 1


FULL, HALF, DRAWN = "steps/s", "steps/s in bf16", "pictures/s"
GROUPS = {
    "mini": [
        Group(FULL, _training(None), each=5, warm=10, turns=24),
        Group(HALF, _training(torch.bfloat16), each=5, warm=10, turns=24),
        Group(DRAWN, _drawing(8, 10), each=1, warm=1, turns=12, things=8),
    ],
    "layout": [
        Group(FULL, _training(None), each=1, warm=2, turns=8),
        Group(HALF, _training(torch.bfloat16), each=1, warm=2, turns=8),
        Group(DRAWN, _drawing(4, 4), each=1, warm=1, turns=5, things=4),
    ],
}


class Worker:
    """One of a group in a process of its own, with the memory allocator that raybooth gives its workers; the peers' step without."""

    def __init__(self, model: str, folder: Path, group: int, name: str):
        environment = os.environ if name == PEERS else {**os.environ, **allocator.environment()}
        command = [sys.executable, "-m", "benchmarks.loops", model, str(folder), str(group), name]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def asked(self) -> float:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._told()

    def ended(self) -> float:
        assert self.process.stdin
        self.process.stdin.close()
        told = self._told()
        self.process.wait()
        return told

    def _told(self) -> float:
        assert self.process.stdout
        return float(self.process.stdout.readline())


def answer(model: str, folder: Path, group: int, name: str) -> None:
    """What the process does: print the seconds of a turn for each line that it reads, and at the end the peak of its memory."""
    how = GROUPS[model][group]
    if name != PEERS and how.unit != DRAWN:  # as raybooth's own workers: those that train, and no others
        allocator.keep_freed_memory()
    work = how.made[name](folder)
    for _ in range(how.warm):
        next(work)
    for _ in sys.stdin:
        began = time.monotonic()
        for _ in range(how.each):
            next(work)
        print(time.monotonic() - began, flush=True)
    print(peak_memory(), flush=True)


def _table(model: str, folder: Path, group: int) -> None:
    how = GROUPS[model][group]
    workers = {name: Worker(model, folder, group, name) for name in how.made}
    for worker in workers.values():  # the first answer comes after the warming up, and does not count
        worker.asked()
    turns = []
    for k in range(how.turns):
        order = list(workers) if k % 2 else list(workers)[::-1]
        turns.append({name: workers[name].asked() for name in order})
    print(f"\n| {model} | {how.unit} | raybooth's rate over it | peak memory, MB |\n|---|---|---|---|")
    for name, worker in workers.items():
        rate = how.each * how.things / statistics.median(t[name] for t in turns)
        ratio = statistics.median(t[name] / t["raybooth"] for t in turns)
        print(f"| {name} | {rate:.2f} | {ratio:.2f} | {worker.ended() / 1e6:.0f} |", flush=True)


def tables() -> None:
    """Print a table per model and group; rates are medians over the turns, and so are the ratios, each within a turn."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"mini": FOLDER, "layout": Path(scratch) / "layout"}
        layout(folders["layout"])
        for model, groups in GROUPS.items():
            for group in range(len(groups)):
                _table(model, folders[model], group)


if __name__ == "__main__":
    model, folder, group, name = sys.argv[1:]
    answer(model, Path(folder), int(group), name)
