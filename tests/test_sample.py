"""Sampling: a picture is its prompt's and seed's alone, and it is what diffusers draws."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from toys import make_sd3

from raybooth.errors import RayboothError
from raybooth.families import family_of, samplers, sd3
from raybooth.families.parts import load
from raybooth.mini import FOLDER
from raybooth.noise import normal
from raybooth.sample import Sampler
from raybooth.sections import Sampling


def sampler(toy: Path, scheduler: str = "dpmsolver++", guidance: float = 3.0, batch: int = 4) -> Sampler:
    family = family_of(toy)
    return Sampler(family, load(family, toy, ("unet", "vae", "text_encoder")), Sampling(6, guidance, scheduler, 32), batch)


def test_a_picture_is_the_same_alone_in_a_batch_and_elsewhere(toy: Path):
    prompts, seeds = [f"photo of a {c} dog" for c in ("red", "blue", "black", "white", "green", "pink")], [11, 12, 13, 14, 15, 16]
    together = list(sampler(toy).draw(prompts, seeds))
    for i in (0, 3, 5):
        alone = next(iter(sampler(toy).draw([prompts[i]], [seeds[i]])))
        assert np.array_equal(together[i], alone)
    backwards = list(sampler(toy).draw(prompts[::-1], seeds[::-1]))
    assert all(np.array_equal(a, b) for a, b in zip(together, backwards[::-1], strict=True))
    assert not np.array_equal(together[0], together[1])


ORACLES = {
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {}),
}


def test_ddim_does_not_clip_latents_where_the_configuration_does_not_say(toy: Path, tmp_path: Path):
    """diffusers' default is for models of pixels."""
    silent = tmp_path / "silent"
    shutil.copytree(toy, silent)
    file = silent / "scheduler" / "scheduler_config.json"
    held = json.loads(file.read_text())
    assert held.pop("clip_sample") is False
    file.write_text(json.dumps(held))
    reference, drawn = (next(sampler(folder, "ddim").draw(["photo of a red dog"], [1])) for folder in (toy, silent))
    assert np.array_equal(reference, drawn)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("name", ORACLES)
def test_it_is_what_the_pipeline_of_diffusers_draws(toy: Path, name: str, guidance: float):
    pipe = StableDiffusionPipeline.from_pretrained(toy)
    pipe.set_progress_bar_config(disable=True)
    kind, extra = ORACLES[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **extra)
    latents = torch.stack([normal((4, 16, 16), s, "latents") for s in (1, 2)])
    prompts = ["photo of a red dog", "photo of a cat at night"]
    theirs = pipe(prompts, latents=latents, num_inference_steps=6, guidance_scale=guidance, output_type="np", height=32, width=32).images
    ours = np.stack(list(sampler(toy, name, guidance, batch=2).draw(prompts, [1, 2])))
    assert np.abs(ours - theirs * 255).max() <= 0.6  # half a level of rounding


@pytest.mark.parametrize(
    ("name", "steps"),
    [*itertools.product(["dpmsolver++", "ddim", "pndm", "euler"], [25, 100, 101, 200, 999]), *itertools.product(["dpmsolver++", "euler"], [150, 334, 501])],
)
def test_any_number_of_steps_comes_from_noise_to_the_picture(name: str, steps: int):
    """A denoiser that knows the picture is led to it, from the first tenth of the noise."""
    made = samplers.scheduler(FOLDER, name, steps, (4, 8, 8), torch.device("cpu"))
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alphas, z = made.alphas_cumprod, noise * made.init_noise_sigma
    assert made.timesteps[0] >= 900
    for t in made.timesteps:
        signal, sigma = alphas[int(t)].sqrt(), (1 - alphas[int(t)]).sqrt()
        z = made.step((made.scale_model_input(z, t) - signal * clean) / sigma, t, z).prev_sample
    assert (z - clean).abs().max() < 0.15  # ddim and pndm end at the first noise of the schedule


@pytest.mark.parametrize(("steps", "instead"), [(150, 142), (334, 333), (501, 500), (600, 500)])
def test_steps_that_would_not_begin_with_the_noise_are_refused(steps: int, instead: int):
    for name in ("ddim", "pndm"):
        with pytest.raises(RayboothError, match=rf"{steps} steps of {name} would begin amid the noise: set .* to {instead}, "):
            samplers.scheduler(FOLDER, name, steps, (4, 8, 8), torch.device("cpu"))
        assert samplers.scheduler(FOLDER, name, instead, (4, 8, 8), torch.device("cpu")).timesteps[0] >= 900


def test_pndm_is_refused_where_the_noise_ends_in_nothing_but_noise(tmp_path: Path):
    """diffusers' has no steps for such a schedule, and would draw along another."""
    shutil.copytree(FOLDER / "scheduler", tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(RayboothError, match="pndm has no steps for this model"):
        samplers.scheduler(tmp_path, "pndm", 20, (4, 8, 8), torch.device("cpu"))
    for name in ("ddim", "euler", "dpmsolver++"):
        samplers.scheduler(tmp_path, name, 20, (4, 8, 8), torch.device("cpu"))


def test_more_steps_than_there_is_noise_are_refused(tmp_path: Path):
    change = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text()) | {"num_train_timesteps": 50}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(change))
    with pytest.raises(RayboothError, match="60 steps are more than ddim can take"):
        samplers.scheduler(tmp_path, "ddim", 60, (4, 8, 8), torch.device("cpu"))


def test_a_flow_takes_as_many_steps_of_dpm_solver_as_there_are_times(tmp_path: Path):
    """Where two of its whole timesteps are alike it would begin with the second, and leave its table at the end."""
    made = sd3.scheduler(make_sd3(tmp_path / "sd3"), "dpmsolver++", 999, (16, 4, 4), torch.device("cpu"))
    assert made.timesteps[0] == made.timesteps[1]
    z, ends = torch.ones(1, 16, 4, 4), made.sigmas[1:]
    for t, sigma in zip(made.timesteps, ends, strict=True):
        z = made.step(torch.ones_like(z), t, z, return_dict=False)[0]  # a velocity of one: along the flow straight to x0 = 0
        assert z.mean().item() == pytest.approx(sigma.item(), abs=1e-3)


def test_what_is_not_finite_is_no_black_picture(toy: Path):
    drawing = sampler(toy)
    next(drawing.loaded.modules["unet"].parameters()).data.fill_(float("nan"))
    with pytest.raises(RayboothError, match="not finite"):
        next(drawing.draw(["photo of a dog"], [1]))
