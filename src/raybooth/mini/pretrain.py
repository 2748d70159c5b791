"""Training mini from scratch: tokenizer, VAE, CLIP, identity ViT and, on the first three, the UNet.

Each phase of a part is a folder in the working folder when it is done, a checkpoint before; the same command goes on after a stop.
"""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from raybooth.mini import networks
from raybooth.mini.things import KINDS
from raybooth.mini.trainer import Trainer
from raybooth.mini.world import Scene, caption, make_identity, make_scene, make_worn, random_scene, render

# Phases of a part go on from one another. The VAE's: whole pictures, then crops of the things, then whole ones again; CLIP's: random pairs,
# look-alikes, the vision tower alone (the UNet is trained on the text tower).
STEPS = {
    "vae": 2400, "vae-detail": 1900, "vae-fine": 3000, "vae-whole": 2000, "vae-decoder": 2000,
    "clip": 700, "clip-kinds": 420, "clip-vision": 400,
    "vit": 700, "vit-long": 700,
    "unet": 3000, "unet-long": 4000, "unet-wide": 4000,
}  # fmt: skip
PHASES = {part: [name for name in STEPS if name.split("-")[0] == part] for part in ("vae", "clip", "vit", "unet")}
HARD = {"dog": 3.0, "cat": 2.5, "bird": 1.5, "fish": 1.5}
"""How often the UNet sees a kind, against 1 for the others: what bends is harder to draw than what is built."""


def pixels(scenes: list[Scene]) -> Tensor:
    """The scenes' pictures, (n, 3, 64, 64) in [-1, 1]."""
    array = np.stack([np.asarray(render(s)) for s in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def scenes_of_step(step: int, batch: int) -> list[Scene]:
    return [random_scene(step * batch + i) for i in range(batch)]


def _captions(scenes: list[Scene], step: int, terse: float = 0.25) -> list[str]:
    rng = random.Random(f"captions {step}")
    return [caption(s, rng, terse) for s in scenes]


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """The texts' token numbers, (n, 32), padded."""
    batch = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return batch.input_ids


def start_from(shipped: Path, work: Path, parts: Sequence[str]) -> None:
    """Set up `work` so that the last phase of `parts` goes on from the shipped weights, and everything else counts as done.

    A part that has begun there is left alone: shipped weights in place of its last phase would pass for what was trained.
    """
    for part, phases in {**PHASES, "tokenizer": ["tokenizer"]}.items():
        if not any((work / name).exists() for name in phases):
            for name in phases[:-1] if part in parts else phases:
                shutil.copytree(shipped / part, work / name)


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(str(key)).getrandbits(63))


def train_tokenizer(work: Path) -> CLIPTokenizer:
    path = work / "tokenizer"
    if not path.exists():
        networks.make_tokenizer(caption(random_scene(i)) for i in range(20_000)).save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def vae_loss(vae: AutoencoderKL, x: Tensor, generator: torch.Generator, squared: float = 1.0) -> Tensor:
    """L1 + MSE + L1 of the picture's gradients (sharp edges without a discriminator) + a little KL."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample(generator)).sample
    edges = sum((a - b).abs().mean() for a, b in zip(_gradients(x), _gradients(y), strict=True))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return (x - y).abs().mean() + squared * F.mse_loss(x, y) + edges + 5e-4 * kl


def _cropped(x: Tensor, generator: torch.Generator, side: int = 32) -> Tensor:
    """The same random crop of every picture, from the middle, where the things are."""
    top, left = (int(torch.randint(lo, hi, (), generator=generator)) for lo, hi in ((10, 26), (4, 28)))
    return x[..., top : top + side, left : left + side]


def train_vae(work: Path, steps: dict[str, int] = STEPS, batch: int = 8) -> AutoencoderKL:
    torch.manual_seed(1)
    vae = networks.make_vae()

    def loss(step: int) -> Tensor:
        return vae_loss(vae, pixels(scenes_of_step(step, batch)), _generator("vae", step))

    def finish(name: str) -> None:
        with torch.no_grad():
            latents = vae.encode(pixels(scenes_of_step(0, 256))).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        vae.save_pretrained(work / name)

    def crops_loss(name: str, first: int, step: int) -> Tensor:
        """Crops cost a quarter and show what is hard; every fourth batch is whole, for the normalisation's statistics."""
        g = _generator(name, step)
        x = pixels([random_scene(first + step * 16 + i) for i in range(8 if step % 4 == 0 else 16)])
        return vae_loss(vae, x if step % 4 == 0 else _cropped(x, g), g, squared=4.0)

    def whole_loss(name: str, first: int, step: int) -> Tensor:
        x = pixels([random_scene(first + step * 16 + i) for i in range(16)])
        return vae_loss(vae, x, _generator(name, step), squared=4.0)

    detail = partial(crops_loss, "vae-detail", 10**6)
    fine = partial(crops_loss, "vae-fine", 2 * 10**6)
    whole, decoder = partial(whole_loss, "vae-whole", 3 * 10**6), partial(whole_loss, "vae-decoder", 4 * 10**6)
    vae = _train(work, "vae", vae, loss, finish, steps=steps["vae"], lr=2e-3)
    vae = _train(work, "vae-detail", vae, detail, finish, steps=steps["vae-detail"], lr=1.5e-3)
    vae = _train(work, "vae-fine", vae, fine, finish, steps=steps["vae-fine"], lr=1e-3, decay=1.0)
    late = partial(_train, work, lr=1e-3, decay=0.7, muon=0.01, bf16=True)
    vae = late("vae-whole", vae, whole, finish, steps=steps["vae-whole"])
    # Latents, and so the UNet, stay as they are.
    return late("vae-decoder", vae, decoder, finish, steps=steps["vae-decoder"], only=("decoder", "post_quant"))


def train_clip(work: Path, tokenizer: CLIPTokenizer, steps: dict[str, int] = STEPS, batch: int = 160) -> CLIPModel:
    """Train CLIP contrastively (Radford et al. 2021), on pictures lightly blurred and noised so that drawn ones are read as well."""
    torch.manual_seed(2)
    clip: Any = networks.make_clip(len(tokenizer))

    def loss(step: int) -> Tensor:
        scenes = scenes_of_step(step, batch)
        x = roughened(pixels(scenes), _generator("clip", step))
        return clip(input_ids=tokens(tokenizer, _captions(scenes, step)), pixel_values=x, return_loss=True).loss

    def kinds_loss(step: int) -> Tensor:
        """Among random pictures place and colours nearly suffice to find the caption; look-alikes and a head make it see kinds."""
        return look_alike_loss("clip-kinds", step)

    def vision_loss(step: int) -> Tensor:
        return look_alike_loss("clip-vision", step + steps["clip-kinds"])

    def look_alike_loss(name: str, step: int) -> Tensor:
        scenes = scenes_of_step(10**5 + step, batch // 2) + look_alikes(step, batch // 8)
        x = roughened(pixels(scenes), _generator(name, step))
        out = clip(input_ids=tokens(tokenizer, _captions(scenes, step)), pixel_values=x, return_loss=True)
        kinds = torch.tensor([list(KINDS).index(s.identity.kind) for s in scenes])
        return out.loss + F.cross_entropy(clip.kind_head(out.vision_model_output.pooler_output), kinds)

    def finish(name: str) -> None:
        if hasattr(clip, "kind_head"):
            del clip.kind_head
        clip.save_pretrained(work / name)

    clip = _train(work, "clip", clip, loss, finish, steps=steps["clip"], lr=1e-3)
    for name, its_loss, lr, only in (("clip-kinds", kinds_loss, 1e-3, ("",)), ("clip-vision", vision_loss, 7e-4, ("vision", "visual", "kind", "logit"))):
        if not (work / name).exists():
            clip.kind_head = torch.nn.Linear(clip.config.projection_dim, len(KINDS))
        clip = _train(work, name, clip, its_loss, finish, steps=steps[name], lr=lr, only=only)
    return clip


def look_alikes(step: int, groups: int, alike: int = 4) -> list[Scene]:
    """Groups of scenes of different kinds that share place, size, direction and colours."""
    rng = random.Random(f"look-alikes {step}")
    scenes = []
    for _ in range(groups):
        model = make_identity(rng)
        frame = make_scene(rng, model, None)
        for kind in rng.sample(list(KINDS), alike):
            one = make_identity(rng, kind)
            one = replace(one, color=model.color, accent=model.accent)
            own = make_scene(rng, one, None)
            scenes.append(replace(own, place=frame.place, size=frame.size, mirrored=frame.mirrored))
    return scenes


def roughened(x: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures, half of them blurred by a reduction to 32 to 60 pixels, all with noise up to 0.1: scorers must not judge sharpness."""
    blurred = torch.rand(len(x), generator=generator) < 0.5
    side = int(torch.randint(32, 61, (1,), generator=generator))
    small = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    x = torch.where(blurred[:, None, None, None], F.interpolate(small, size=x.shape[-2:], mode="bilinear"), x)
    amount = 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x + amount * torch.randn(x.shape, generator=generator)


def identity_pairs(step: int, groups: int = 20, alike: int = 4) -> tuple[list[Scene], list[Scene]]:
    """Two scenes each of groups * alike identities; those of one group differ only in what captions never mention."""
    rng = random.Random(f"identities {step}")
    pairs = []
    for _ in range(groups):
        kin = make_identity(rng)
        for _ in range(alike):
            one = replace(kin, seed=rng.getrandbits(32))
            pairs.append([make_scene(rng, one, make_worn(rng, one, 0.3)) for _ in range(2)])
    return [a for a, _ in pairs], [b for _, b in pairs]


def train_vit(work: Path, steps: dict[str, int] = STEPS, temperature: float = 0.1) -> ViTModel:
    """Train the ViT: two scenes of one identity attract, all others repel (InfoNCE, van den Oord et al. 2018)."""
    torch.manual_seed(3)
    vit = networks.make_vit()

    def loss(step: int) -> Tensor:
        first, second = identity_pairs(step)
        x = roughened(pixels(first + second), _generator("vit", step))
        z = F.normalize(vit(x).last_hidden_state[:, 0], dim=-1)
        a, b = z.chunk(2)
        logits, target = a @ b.T / temperature, torch.arange(len(a))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def long_loss(step: int) -> Tensor:
        return loss(steps["vit"] + step)

    def finish(name: str) -> None:
        vit.save_pretrained(work / name)

    vit = _train(work, "vit", vit, loss, finish, steps=steps["vit"], lr=7e-4)
    return _train(work, "vit-long", vit, long_loss, finish, steps=steps["vit-long"], lr=7e-4, decay=0.5)


def cached_latents(work: Path, vae: AutoencoderKL, scenes: range) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of the scenes of these numbers, scaled: 2 x (n, 4, 16, 16)."""
    path = work / f"latents-{scenes.start}-{scenes.stop}.safetensors"
    if not path.exists():
        partial, means, stds = path.with_suffix(".new"), [], []
        for i in range(0, len(scenes), 50):
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                d = vae.encode(pixels([random_scene(j) for j in scenes[i : i + 50]])).latent_dist
            means.append(d.mean * vae.config.scaling_factor)
            stds.append(d.std * vae.config.scaling_factor)
        save_file({"mean": torch.cat(means), "std": torch.cat(stds)}, partial)
        partial.rename(path)
    cache = load_file(path)
    return cache["mean"], cache["std"]


def min_snr(alpha: Tensor) -> Tensor:
    """Weight of epsilon's squared error, min(SNR, 5) / SNR (Hang et al. 2023). `alpha` is the cumulative product."""
    return (5 * (1 - alpha) / alpha).clamp(max=1)


def structure_first(alpha: Tensor) -> Tensor:
    """min_snr times the weight of v-prediction's loss over epsilon's, 1 + 1 / SNR, at most 10: the noisy end settles kind, posture and colours."""
    return min_snr(alpha) * (1 / alpha).clamp(max=10)


def train_unet(work: Path, tokenizer: CLIPTokenizer, vae: AutoencoderKL, clip: CLIPModel, steps: dict[str, int] = STEPS) -> UNet2DConditionModel:
    """Train the UNet: epsilon, stratified timesteps, one prompt in ten empty; the text tower is frozen."""
    torch.manual_seed(4)
    unet = networks.make_unet()
    networks.zero_init(unet)
    scheduler, text = networks.make_scheduler(), clip.text_model.eval().requires_grad_(False)

    @cache
    def world(numbers: range) -> tuple[list[Scene], Tensor, Tensor, Tensor]:
        scenes = [random_scene(i) for i in numbers]
        return scenes, torch.tensor([HARD.get(s.identity.kind, 1.0) for s in scenes]), *cached_latents(work, vae, numbers)

    def loss(numbers: range, batch: int, weight: Callable[[Tensor], Tensor], terse: float, first: int, step: int) -> Tensor:
        scenes, chances, mean, std = world(numbers)
        g = _generator("unet", first + step)
        rows = torch.multinomial(chances, batch, generator=g)
        texts = _captions([scenes[int(i)] for i in rows], first + step, terse)
        texts = ["" if torch.rand((), generator=g) < 0.1 else t for t in texts]
        with torch.no_grad():
            condition = text(tokens(tokenizer, texts)).last_hidden_state
        x = mean[rows] + std[rows] * torch.randn(batch, 4, 16, 16, generator=g)
        t = ((torch.arange(batch) + torch.rand(batch, generator=g)) * (1000 / batch)).long().clamp(0, 999)
        noise = torch.randn(x.shape, generator=g)
        out = unet(scheduler.add_noise(x, noise, t), t, condition).sample
        return (weight(scheduler.alphas_cumprod[t]) * (out - noise).square().mean((1, 2, 3))).mean()

    def finish(name: str) -> None:
        unet.save_pretrained(work / name)

    near, far = range(24_000), range(24_000, 72_000)
    unet = _train(work, "unet", unet, partial(loss, near, 32, min_snr, 0.25, 0), finish, steps=steps["unet"], lr=1e-3)
    long = partial(loss, near, 32, min_snr, 0.25, steps["unet"])
    # Terse prompts, such as a class's, are where colours and kinds were mixed most.
    wide = partial(loss, far, 64, structure_first, 0.5, 10**6)
    unet = _train(work, "unet-long", unet, long, finish, steps=steps["unet-long"], lr=8e-4, decay=0.4)
    return _train(work, "unet-wide", unet, wide, finish, steps=steps["unet-wide"], lr=8e-4, decay=0.5, ema=0.999, bf16=True)


def _train(
    work: Path, name: str, net: Any, loss: Callable[[int], Tensor], finish: Callable[[str], None],
    *, steps: int, lr: float, only: tuple[str, ...] = ("",), **how: Any,
) -> Any:  # fmt: skip
    """`net` trained and saved by `finish`, or read back in place if it is done. `only` are prefixes of the parameters to train; `how` is for the trainer."""
    if (work / name / "config.json").exists():
        done = type(net).from_pretrained(work / name)
        own = net.state_dict().keys()  # a ViT is read back with a pooling layer that it does not have
        net.load_state_dict({k: v for k, v in done.state_dict().items() if k in own})
        if hasattr(net, "register_to_config"):
            net.register_to_config(**done.config)
        return net.eval()
    for key, parameter in net.named_parameters():
        parameter.requires_grad_(key.startswith(only))
    Trainer(name, net, loss, steps=steps, lr=lr, folder=work, **how).run()
    finish(f"{name}.new")
    (work / f"{name}.new").rename(work / name)
    return net
