"""Denoising with a seed per picture.

Pictures are drawn in batches of one fixed shape, the last one padded: the same kernels run whatever is drawn together,
so a picture's bits depend on its prompt, its seed and the settings alone, not on its neighbours or its worker.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from raybooth.config import Sampling
from raybooth.families import Family, Loaded
from raybooth.families.parts import decode
from raybooth.noise import normal


class Sampler:
    """Draws with one loaded model.

    Args:
        batch: pictures in one forward pass (twice as many rows with guidance).
    """

    def __init__(self, family: Family, loaded: Loaded, sampling: Sampling, batch: int):
        self.family, self.loaded, self.sampling, self.batch = family, loaded, sampling, batch
        self.parameter = next(loaded.modules[family.denoiser].parameters())
        self._texts: dict[str, dict[str, Tensor]] = {}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[np.ndarray]:
        """One (h, w, 3) uint8 picture for each pair of prompt and seed, in order."""
        for start in range(0, len(seeds), self.batch):
            rows = list(zip(prompts, seeds, strict=True))[start : start + self.batch]
            padded = rows + [rows[-1]] * (self.batch - len(rows))
            yield from self._draw_batch([p for p, _ in padded], [s for _, s in padded])[: len(rows)]

    @torch.inference_mode()
    def _draw_batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        facts, sampling = self.loaded.facts, self.sampling
        shape = facts.latent_shape(sampling.resolution)
        scheduler = self.family.scheduler(self.loaded.folder, sampling.scheduler, sampling.steps, shape, self.parameter.device)
        # Schedulers of flows neither scale the first noise nor what the denoiser sees, and have no names for it.
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
        z = torch.stack([normal(shape, s, "latents") for s in seeds]).to(self.parameter) * getattr(scheduler, "init_noise_sigma", 1.0)
        guided = sampling.guidance > 1 and not facts.embeds_guidance
        text = self._conditioning([""] * len(prompts) + list(prompts) if guided else prompts)
        for t in scheduler.timesteps:
            x = scaled(torch.cat([z, z]) if guided else z, t)
            out = self.family.predict(self.loaded, x, t.expand(len(x)), text)
            if guided:
                empty, full = out.chunk(2)
                out = empty + sampling.guidance * (full - empty)
            z = scheduler.step(out, t, z, return_dict=False)[0]
        return self._decoded(z)

    def _conditioning(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Of the prompts, each encoded once and by itself."""
        for prompt in set(prompts) - self._texts.keys():
            self._texts[prompt] = {k: v[0] for k, v in self.family.encode_text(self.loaded, [prompt]).items()}
        stacked = {k: torch.stack([self._texts[p][k] for p in prompts]) for k in self._texts[prompts[0]]}
        if self.loaded.facts.embeds_guidance:
            stacked["guidance"] = torch.full((len(prompts),), self.sampling.guidance, device=self.parameter.device)
        return stacked

    def _decoded(self, z: Tensor) -> np.ndarray:
        # A large picture's decoding needs more memory than all of its denoising: one at a time.
        rows = len(z) if self.sampling.resolution <= 128 else 1
        pixels = torch.cat([decode(self.loaded, part) for part in z.split(rows)])
        levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
        return levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
