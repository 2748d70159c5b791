"""Samplers of models whose noise is a DDPM's: Stable Diffusion up to XL."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.errors import RayboothError

if TYPE_CHECKING:
    import torch

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # diffusers' default is for pixels, which end at 1; latents do not
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
}
SAFE_STEPS = 100
"""As many steps as a sampler can take with any model; with more, strides become short and need a closer look."""
_ANY_STRIDE = ("dpmsolver++", "euler")
"""Samplers that read their strides from the timesteps; the strides of the others are whole and of equal length."""


def is_safe(name: str, steps: int) -> bool:
    """Whether a sampler can take that many steps with any model: then the model need not be looked at, nor torch imported."""
    return steps <= SAFE_STEPS and name != "pndm"


def ddim(folder: Path) -> Any:
    """diffusers' DDIMScheduler of a model folder: it reads the noise of every such model."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(folder / "scheduler")


def scheduler(folder: Path, name: str, steps: int, shape: tuple[int, int, int], device: "torch.device") -> Any:
    """The named sampler with its timesteps set. All are deterministic: a picture depends on its initial latents and on nothing drawn on the way.

    Raises:
        RayboothError: if there are more steps than the model has timesteps, if they would begin too far from pure noise, if the sampler cannot
            handle zero terminal SNR, or if the model's own scheduler is described in a way that diffusers cannot follow.
    """
    import diffusers

    from raybooth.families.parts import explained

    kind, extra = SAMPLERS[name]
    if steps > SAFE_STEPS and name in _ANY_STRIDE:
        extra = {**extra, "timestep_spacing": "linspace"}
    with explained(folder / "scheduler"):
        how = ddim(folder).config
    if name == "pndm" and how.get("rescale_betas_zero_snr"):
        raise RayboothError("pndm has no steps for this model, whose noise ends in nothing but noise (zero terminal SNR): take dpmsolver++, ddim or euler.")
    noise = int(how.num_train_timesteps)
    if steps > noise:
        raise RayboothError(f"{steps} steps are more than {name} can take with this model: lower prior.steps, or generate.steps.")
    with explained(folder / "scheduler"):
        made = getattr(diffusers, kind).from_config(how, **extra)
        made.set_timesteps(steps, device=device)
    if steps > SAFE_STEPS and made.timesteps[0] < 0.9 * noise:  # strides are whole: 501 steps out of 1000 leave out the noisiest 499
        fewer = next(n for n in range(steps, 0, -1) if (n - 1) * (noise // n) >= 0.9 * noise)
        raise RayboothError(f"{steps} steps of {name} would begin amid the noise: set prior.steps, or generate.steps, to {fewer}, or take dpmsolver++.")
    return made
