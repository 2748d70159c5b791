"""Denoising with a seed per picture.

Pictures are drawn in batches of one fixed shape, the last one padded: the same kernels run whatever is drawn together,
so a picture's bits depend on its prompt, its seed and the settings alone, not on its neighbours or its worker.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from raybooth.errors import NotFiniteError
from raybooth.families import Family, Loaded
from raybooth.families.parts import decode
from raybooth.noise import normal
from raybooth.sections import Sampling

Switch = Callable[[Sequence[str]], None]
"""Puts the named adapters in place, one for each row of the forward pass that follows; "" is none."""
Watch = Callable[[int, Tensor], None]
"""Is told, after each step, how many are done and which clean latents (batch, c, h, w) the model expects. What it raises ends the drawing."""
KEPT = 64  # encoded prompts


def decoded_at_once(pictures: int, side: int) -> int:
    """How many pictures to decode at once: large ones one by one, as decoding one needs more memory than all of its denoising."""
    return pictures if side <= 128 else 1


class Sampler:
    """Draws with one loaded model.

    Args:
        batch: pictures in one forward pass (twice as many rows with guidance).
        switch: for rows with adapters of their own.
    """

    def __init__(self, family: Family, loaded: Loaded, sampling: Sampling, batch: int, switch: Switch | None = None):
        self.family, self.loaded, self.sampling, self.batch = family, loaded, sampling, batch
        self.switch: Switch = switch or (lambda adapters: None)
        self.parameter = next(loaded.modules[family.denoiser].parameters())
        self._texts: OrderedDict[tuple[str, str], dict[str, Tensor]] = OrderedDict()

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[np.ndarray]:
        """One (h, w, 3) uint8 picture for each pair of prompt and seed, in order."""
        for start in range(0, len(seeds), self.batch):
            rows = slice(start, start + self.batch)
            yield from self.draw_batch(prompts[rows], seeds[rows])

    def draw_batch(
        self, prompts: Sequence[str], seeds: Sequence[int], adapters: Sequence[str] = (), sampling: Sampling | None = None, watch: Watch | None = None
    ) -> np.ndarray:
        """(n, h, w, 3) uint8 pictures, at most a batch of them, in one forward pass a step. `sampling` replaces the sampler's for this batch."""
        texts = list(zip(adapters or [""] * len(seeds), prompts, strict=True))
        spare, own = self.batch - len(seeds), list(seeds)
        return self._draw(texts + texts[-1:] * spare, own + own[-1:] * spare, sampling or self.sampling, watch)[: len(own)]

    @torch.inference_mode()
    def _draw(self, texts: Sequence[tuple[str, str]], seeds: Sequence[int], sampling: Sampling, watch: Watch | None) -> np.ndarray:
        facts = self.loaded.facts
        shape = facts.latent_shape(sampling.resolution)
        scheduler = self.family.scheduler(self.loaded.folder, sampling.scheduler, sampling.steps, shape, self.parameter.device)
        # Schedulers of flows scale neither the first noise nor what the denoiser sees, and lack these attributes.
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
        z = torch.stack([normal(shape, s, "latents") for s in seeds]).to(self.parameter) * getattr(scheduler, "init_noise_sigma", 1.0)
        guided = sampling.guidance > 1 and not facts.embeds_guidance
        rows = [(adapter, "") for adapter, _ in texts] + list(texts) if guided else list(texts)
        conditioning = self._conditioning(rows, sampling)
        self.switch([adapter for adapter, _ in rows])
        for done, t in enumerate(scheduler.timesteps, 1):
            x = scaled(z, t)
            double = torch.cat([x, x]) if guided else x
            out = self.family.predict(self.loaded, double, t.expand(len(double)), conditioning)
            if guided:
                empty, full = out.chunk(2)
                out = empty + sampling.guidance * (full - empty)
            if watch:
                watch(done, self.loaded.objective.clean(x, out, t.expand(len(x))))
            z = scheduler.step(out, t, z, return_dict=False)[0]
        pixels = self._pixels(z)
        finite = pixels.flatten(1).isfinite().all(1).tolist()
        if not all(finite):  # they would be black pictures
            raise NotFiniteError([i for i, it_is in enumerate(finite) if not it_is])
        return _levels(pixels)

    def _conditioning(self, rows: Sequence[tuple[str, str]], sampling: Sampling) -> dict[str, Tensor]:
        """The conditioning of (adapter, prompt) pairs, each encoded once and by itself."""
        for adapter, prompt in dict.fromkeys(rows):
            if (adapter, prompt) not in self._texts:
                self.switch([adapter])
                self._texts[adapter, prompt] = {k: v[0] for k, v in self.family.encode_text(self.loaded, [prompt]).items()}
            self._texts.move_to_end((adapter, prompt))
        stacked = {k: torch.stack([self._texts[row][k] for row in rows]) for k in self._texts[rows[0]]}
        while len(self._texts) > KEPT:
            self._texts.popitem(last=False)
        if self.loaded.facts.embeds_guidance:
            stacked["guidance"] = torch.full((len(rows),), sampling.guidance, device=self.parameter.device)
        return stacked

    def decoded(self, z: Tensor) -> np.ndarray:
        """Latents decoded to (n, h, w, 3) uint8 pictures."""
        return _levels(self._pixels(z))

    def _pixels(self, z: Tensor) -> Tensor:
        """Latents decoded to (n, 3, h, w) in [-1, 1]."""
        at_once = decoded_at_once(len(z), z.shape[-1] * self.loaded.facts.downscale)
        return torch.cat([decode(self.loaded, part) for part in z.split(at_once)])


def _levels(pixels: Tensor) -> np.ndarray:
    """(n, 3, h, w) in [-1, 1] as (n, h, w, 3) uint8 pictures."""
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
