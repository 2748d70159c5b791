"""What a model family is: a small file of callables, detected from the model folder. Nothing else asks which it is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # drivers ask a family for its files and sizes, and need not wait for torch
    from torch import Tensor, nn

    from raybooth.noise import Diffusion


@dataclass
class Loaded:
    """A model's parts in memory. Those that were not asked for are absent from `modules`."""

    folder: Path
    modules: "dict[str, nn.Module]"
    tokenizer: Any

    def to(self, *args: Any, **kwargs: Any) -> "Loaded":
        for module in self.modules.values():
            module.to(*args, **kwargs)
        return self


@dataclass(frozen=True)
class Facts:
    """What a model folder's configuration says. `downscale` is the side of a picture over the side of its latent."""

    resolution: int
    latent_channels: int
    downscale: int

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return self.latent_channels, resolution // self.downscale, resolution // self.downscale


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: for messages.
        weights: subfolders that hold weights, and others that hold only configuration.
        detect: whether a parsed model_index.json is of this family.
        facts: of a model folder, without reading weights.
        diffusion: of a model folder: its forward process and what its denoiser predicts.
        load: the named parts of a folder, in evaluation mode, without gradients, in float32 unless a dtype is given.
        encode_text: (loaded, prompts) -> conditioning (n, tokens, width).
        encode_image: (loaded, pixels (n, 3, h, w) in [-1, 1]) -> mean and std of the posterior, scaled as the denoiser sees it.
        decode: (loaded, latents) -> pixels in [-1, 1].
        predict: (denoiser, z_t, t, conditioning) -> the denoiser's output.
        trainable: (with text encoder?) -> names of the parts that are fine-tuned.
        scheduler: (folder, sampler's name) -> one of diffusers' schedulers.
        save: (base folder, trained modules, target folder): a pipeline that plain diffusers opens.
    """

    name: str
    weights: tuple[str, ...]
    settings: tuple[str, ...]
    detect: Callable[[dict[str, Any]], bool]
    facts: Callable[[Path], Facts]
    diffusion: "Callable[[Path], Diffusion]"
    load: Callable[..., Loaded]
    encode_text: "Callable[[Loaded, Sequence[str]], Tensor]"
    encode_image: "Callable[[Loaded, Tensor], tuple[Tensor, Tensor]]"
    decode: "Callable[[Loaded, Tensor], Tensor]"
    predict: "Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]"
    trainable: Callable[[bool], Iterable[str]]
    scheduler: Callable[[Path, str], Any]
    save: Callable[[Path, Mapping[str, Any], Path], None]
