"""Denoising with a seed per picture.

Pictures are drawn in batches of one fixed shape, the last one padded: the same kernels run whatever is drawn together,
so a picture's bits depend on its prompt, its seed and the settings alone, not on its neighbours or its worker.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from raybooth.config import Sampling
from raybooth.families import Facts, Family, Loaded
from raybooth.noise import normal

PARTS = ("unet", "vae", "text_encoder")


class Sampler:
    """Draws with one loaded model.

    Args:
        batch: pictures in one forward pass (twice as many rows with guidance).
    """

    def __init__(self, family: Family, loaded: Loaded, facts: Facts, sampling: Sampling, batch: int):
        self.family, self.loaded, self.facts, self.sampling, self.batch = family, loaded, facts, sampling, batch
        self.parameter = next(loaded.modules["unet"].parameters())
        self._texts: dict[str, Tensor] = {}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[np.ndarray]:
        """One (h, w, 3) uint8 picture for each pair of prompt and seed, in order."""
        for start in range(0, len(seeds), self.batch):
            rows = list(zip(prompts, seeds, strict=True))[start : start + self.batch]
            padded = rows + [rows[-1]] * (self.batch - len(rows))
            yield from self._draw_batch([p for p, _ in padded], [s for _, s in padded])[: len(rows)]

    @torch.inference_mode()
    def _draw_batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        scheduler = self.family.scheduler(self.loaded.folder, self.sampling.scheduler)
        scheduler.set_timesteps(self.sampling.steps, device=self.parameter.device)
        shape = self.facts.latent_shape(self.sampling.resolution)
        z = torch.stack([normal(shape, s, "latents") for s in seeds]).to(self.parameter) * scheduler.init_noise_sigma
        guided = self.sampling.guidance > 1
        text = torch.stack([self._text(p) for p in ([""] * len(prompts) if guided else []) + list(prompts)])
        unet = self.loaded.modules["unet"]
        for t in scheduler.timesteps:
            x = scheduler.scale_model_input(torch.cat([z, z]) if guided else z, t)
            out = self.family.predict(unet, x, t.expand(len(x)), text)
            if guided:
                empty, full = out.chunk(2)
                out = empty + self.sampling.guidance * (full - empty)
            z = scheduler.step(out, t, z, return_dict=False)[0]
        return self._decoded(z)

    def _text(self, prompt: str) -> Tensor:
        """A prompt's conditioning, encoded once and by itself."""
        if prompt not in self._texts:
            self._texts[prompt] = self.family.encode_text(self.loaded, [prompt])[0]
        return self._texts[prompt]

    def _decoded(self, z: Tensor) -> np.ndarray:
        # A large picture's decoding needs more memory than all of its denoising: one at a time.
        rows = len(z) if self.sampling.resolution <= 128 else 1
        pixels = torch.cat([self.family.decode(self.loaded, part) for part in z.split(rows)])
        levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
        return levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
