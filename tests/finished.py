"""Runs that end in a model without having trained one, and their pictures by raybooth and by plain diffusers."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from raybooth.base_model import prepare_base
from raybooth.config import Config
from raybooth.families import family_of
from raybooth.families.lora import WEIGHTS, add_adapters, load_adapters, save_adapters
from raybooth.families.parts import load, save
from raybooth.noise import normal
from raybooth.sample import Sampler
from raybooth.sections import Lora, Sampling
from raybooth.session import Run

PROMPT = "photo of unqtkn dog"
SAMPLING = Sampling(2, 3.0, "euler", 32)
CLOSE = 1.1 / 255
"""Largest difference of a pixel, 0 to 1: rounding to a level on our side, and sums in another order."""


def run_of(storage: Path, base: str | Path) -> Run:
    return Run(Config(subject={"class": "dog"}, base={"model": str(base)}, storage=str(storage)), quiet=True)  # type: ignore[arg-type]


def fine_tuned(storage: Path, base: str | Path, how: Lora | None = None, only: str = "") -> Path:
    """A run whose model lies some way from its base, whole (in weights whose names hold `only`) or by adapters."""
    with run_of(storage, base) as run:
        prepare_base(run)
        run.save_config()
        family, g = family_of(run.base_folder), torch.Generator().manual_seed(7)
        trained = family.trainable(text_encoder=True)
        loaded = load(family, run.base_folder, trained)
        if how:
            add_adapters(family, loaded, trained, how, seed=0)
        for module in loaded.modules.values():
            for name, p in module.named_parameters():
                if "lora_B" in name or (not how and only in name):
                    p.data += torch.randn(p.shape, generator=g) * (0.4 if how else 0.2 * p.std(correction=0))
        stage = run.workspace.stage("fine-tuned-model", {"toy": str(how)})
        if how:
            save_adapters(family, loaded.modules, stage.partial)
        else:
            save(run.base_folder, loaded.modules, stage.partial)
        stage.finish()
    return storage


def ours(storage: Path) -> np.ndarray:
    """raybooth's picture, 0 to 1."""
    base, folder = storage / "base-model", storage / "fine-tuned-model"
    adapted = (folder / WEIGHTS).exists()
    family = family_of(base)
    loaded = load(family, base if adapted else folder, (family.denoiser, "vae", *family.encoders))
    if adapted:
        load_adapters(family, loaded, folder)
    return next(Sampler(family, loaded, SAMPLING, 1).draw([PROMPT], [1])) / 255.0


def opened(folder: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def theirs(pipe: Any, base: Path, prompt: str = PROMPT, seed: int = 1) -> np.ndarray:
    """Plain diffusers' picture from the same latents."""
    pipe.set_progress_bar_config(disable=True)
    family = family_of(base)
    if hasattr(pipe, "unet"):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(diffusers.DDIMScheduler.from_pretrained(base / "scheduler").config)
    z = normal(family.facts(base).latent_shape(32), seed, "latents")[None]
    z = pipe._pack_latents(z, *z.shape) if family.pipeline == "FluxPipeline" else z
    return pipe(prompt, latents=z, num_inference_steps=2, guidance_scale=3.0, height=32, width=32, output_type="np").images[0]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())
