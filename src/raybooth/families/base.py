"""What a model family is: a small file of callables, chosen by the model folder. Other code calls them and need not ask which family it has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raybooth.sections import Generate, Prior, Sampling

if TYPE_CHECKING:  # drivers ask a family for its files and sizes, and need not wait for torch
    import torch
    from torch import Tensor, nn

    from raybooth.noise import Objective


@dataclass(frozen=True)
class Facts:
    """What a model folder's configuration says.

    Attributes:
        downscale: the side of a picture over the side of its latent.
        patch: the side of the denoiser's patches, in latents.
        largest: the largest side of a picture, in pixels, if there is one.
        embeds_guidance: whether guidance, if the denoiser takes any, is an input of it rather than a second pass without the prompt.
        text_length: tokens of a prompt that T5 reads, where it is one of the encoders.
    """

    resolution: int
    latent_channels: int
    downscale: int
    patch: int = 1
    largest: int | None = None
    embeds_guidance: bool = False
    text_length: int | None = None

    def __post_init__(self) -> None:
        for size in (self.resolution, self.latent_channels, self.downscale, self.patch):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"a size of {size!r}")

    @property
    def multiple(self) -> int:
        """What a picture's side must be a multiple of, in pixels."""
        return self.downscale * self.patch

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return self.latent_channels, resolution // self.downscale, resolution // self.downscale


@dataclass
class Loaded:
    """A model's parts in memory. Those that were not asked for are absent."""

    folder: Path
    facts: Facts
    objective: "Objective"
    modules: "dict[str, nn.Module]"
    tokenizers: dict[str, Any]
    kept: dict[str, Any] = field(default_factory=dict)  # what a family makes once from the parts

    def to(self, *args: Any, **kwargs: Any) -> "Loaded":
        for module in self.modules.values():
            module.to(*args, **kwargs)
        return self


@dataclass(frozen=True)
class Family:
    """One family of models. A conditioning is a dictionary of tensors, each (n, ...).

    Attributes:
        name: how messages call it.
        pipeline: the name of its pipeline's class in diffusers.
        denoiser: the part that is fine-tuned.
        encoders: the text encoders; `trainable_encoders`: those that can be fine-tuned.
        weights: subfolders that hold weights; `settings`: those that hold only configuration.
        facts: of a model folder, without reading weights.
        objective: of a model folder, its forward process and what its denoiser predicts.
        conditioning: of a model folder, the shapes of one prompt's conditioning.
        encode_text: (loaded, prompts, known=None) -> conditioning. The empty prompt is that of classifier-free guidance. `known` is the prompts'
            conditioning by the base model: the output of encoders that are never trained is taken from it, and they need not be loaded.
        predict: (loaded, z_t, t, conditioning) -> the denoiser's output.
        scheduler: (folder, sampler's name, steps, latent shape, device) -> one of diffusers' schedulers with its timesteps set.
        samplers: names of those that can draw with it; `min_snr`: whether its timesteps can be weighted by min-SNR.
        guidance: the default scale for drawing, as in diffusers' pipeline.
        half: the half precision for drawing on a GPU. FLUX and SD 3 overflow in float16, and are not trained in it either.
        lora_targets: the layers of the denoiser that get adapters; `encoder_lora_targets`: of its text encoders.
    """

    name: str
    pipeline: str
    denoiser: str
    encoders: tuple[str, ...]
    trainable_encoders: tuple[str, ...]
    weights: tuple[str, ...]
    settings: tuple[str, ...]
    facts: Callable[[Path], Facts]
    objective: "Callable[[Path], Objective]"
    conditioning: Callable[[Path], dict[str, tuple[int, ...]]]
    encode_text: "Callable[..., dict[str, Tensor]]"
    predict: "Callable[[Loaded, Tensor, Tensor, Mapping[str, Tensor]], Tensor]"
    scheduler: "Callable[[Path, str, int, tuple[int, int, int], torch.device], Any]"
    samplers: tuple[str, ...]
    min_snr: bool
    guidance: float
    half: Literal["float16", "bfloat16"]
    lora_targets: tuple[str, ...]
    encoder_lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")

    def sampling(self, how: Prior | Generate, resolution: int) -> Sampling:
        """The sampling that a section of the configuration asks for; the family's guidance where it sets none."""
        return Sampling(how.steps, self.guidance if how.guidance is None else how.guidance, how.scheduler, resolution)

    def trainable(self, text_encoder: bool) -> tuple[str, ...]:
        """Names of the parts that are fine-tuned."""
        return (self.denoiser, *self.trainable_encoders) if text_encoder else (self.denoiser,)

    def has_frozen_encoders(self, text_encoder: bool) -> bool:
        """Whether some text encoders are not trained: their output for each prompt is then computed once, beforehand."""
        return not set(self.encoders) <= set(self.trainable(text_encoder))
