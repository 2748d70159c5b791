import torch
from diffusers import DDIMScheduler, DDPMScheduler

from raybooth.mini.networks import make_scheduler
from raybooth.noise import Diffusion, generator, normal


def test_noise_and_targets_are_the_schedulers_own():
    oracle = DDPMScheduler.from_config(make_scheduler().config)
    x0, noise = torch.randn(64, 4, 8, 8), torch.randn(64, 4, 8, 8)
    t = torch.randint(0, 1000, (64,))
    epsilon, velocity = (Diffusion(oracle.alphas_cumprod, p) for p in ("epsilon", "v_prediction"))
    assert (epsilon.noisy(x0, noise, t) - oracle.add_noise(x0, noise, t)).abs().max() < 1e-6
    assert torch.equal(epsilon.target(x0, noise, t), noise)
    assert (velocity.target(x0, noise, t) - oracle.get_velocity(x0, noise, t)).abs().max() < 1e-6


def test_the_alphas_are_stable_diffusions():
    ours = make_scheduler().alphas_cumprod
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert torch.equal(ours, theirs)


def test_draws_depend_on_their_key_alone():
    a = normal((3,), 1, "noise", 5, 0)
    torch.manual_seed(99)
    assert torch.equal(a, normal((3,), 1, "noise", 5, 0))
    others = [normal((3,), *key) for key in ((2, "noise", 5, 0), (1, "posterior", 5, 0), (1, "noise", 6, 0), (1, "noise", 5, 1), (1, "noise", 50))]
    assert all(not torch.equal(a, other) for other in others)
    assert generator(1, "a", "bc").initial_seed() != generator(1, "ab", "c").initial_seed()


def test_min_snr_weighs_as_published_and_pure_noise_too():
    """Hang et al. 2023, eq. 10: min(SNR, gamma) / SNR. Of models with zero terminal SNR the last timestep has none."""
    alphas = DDPMScheduler.from_config(make_scheduler().config).alphas_cumprod.clone()
    alphas[-1] = 0
    t = torch.tensor([0, 300, 700, 998])
    snr = alphas[t] / (1 - alphas[t])
    epsilon, velocity = (Diffusion(alphas, p) for p in ("epsilon", "v_prediction"))
    assert torch.allclose(epsilon.weight(t, 5.0), torch.minimum(snr, torch.tensor(5.0)) / snr)
    assert torch.allclose(velocity.weight(t, 5.0), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1))
    assert epsilon.weight(torch.tensor([999]), 5.0).item() == 1
    assert velocity.weight(torch.tensor([999]), 5.0).item() == 0
