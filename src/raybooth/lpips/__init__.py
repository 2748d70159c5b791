"""LPIPS (Zhang et al. 2018), the perceptual distance by which the DreamBooth paper measures diversity: VGG16 and its published linear layers.

`linear.safetensors` holds the latter, those of version 0.1 (BSD-2-Clause, see LICENSE beside it); VGG16's own weights are fetched.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from raybooth.errors import RayboothError

if TYPE_CHECKING:
    from PIL.Image import Image

Layer = tuple[Tensor, Tensor]
SIDE = 256
"""Larger pictures are reduced to it (the shorter side, by averages), as Karras et al. 2019 do before LPIPS: the distance depends on the size."""
_BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""VGG16's convolutions by their places among its features: a ReLU follows each, and a block's last is compared. 2x2 maxima lie between the blocks."""
_WIDTHS = (64, 128, 256, 512, 512)
_FEW, _STRIP = 8, 16  # pictures that go through a block at once, lines of their features that are compared at once
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]


def lpips(weights: Path, device: str = "cpu") -> Callable[["Sequence[Image]"], Tensor]:
    """A function from pictures of one size to their distances from one another, (n, n). `weights` is VGG16's file, with torchvision's and timm's names."""
    blocks, linear = _vgg(weights, device), load_file(Path(__file__).with_name("linear.safetensors"), device=device)

    @torch.inference_mode()
    def distances(images: "Sequence[Image]") -> Tensor:
        x = torch.cat([_pixels(image) for image in images]).to(device)
        found = torch.zeros(len(x), len(x), device=device)
        for number, block in enumerate(blocks):
            x = torch.cat([_through(block, few if number == 0 else F.max_pool2d(few, 2)) for few in x.split(_FEW)])
            for strip in x.split(_STRIP, dim=2):  # what is computed of the features takes a multiple of their memory
                found += _squares(strip, linear[str(number)]) / (x.shape[2] * x.shape[3])
        return found.fill_diagonal_(0)

    return distances


def check(weights: Path) -> None:
    """Refuse a safetensors file that does not hold VGG16's convolutions, by its header.

    Raises:
        RayboothError: naming what it lacks.
    """
    with safe_open(weights, "pt") as held:
        names, width = set(held.keys()), 3
        for block, out in zip(_BLOCKS, _WIDTHS, strict=True):
            for place in block:
                name = f"features.{place}.weight"
                if name not in names or held.get_slice(name).get_shape() != [out, width, 3, 3] or f"features.{place}.bias" not in names:
                    raise RayboothError(f"{weights} has no {name} of shape ({out}, {width}, 3, 3): evaluate.lpips must be VGG16, such as timm/vgg16.tv_in1k.")
                width = out


def _vgg(weights: Path, device: str) -> list[list[Layer]]:
    check(weights)
    with safe_open(weights, "pt", device=device) as held:
        return [[tuple(held.get_tensor(f"features.{i}.{part}").float() for part in ("weight", "bias")) for i in block] for block in _BLOCKS]


def _through(block: list[Layer], x: Tensor) -> Tensor:
    for weight, bias in block:
        x = F.relu(F.conv2d(x, weight, bias, padding=1))
    return x


def _squares(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared distances of features (n, c, h, w), scaled to length 1 at each place, summed over the places: (n, n) (equation 1)."""
    unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
    flat = (unit * weight.sqrt()[:, None, None]).flatten(1)
    squares = flat.square().sum(1)
    return (squares[:, None] + squares - 2 * flat @ flat.T).clamp(min=0)


def _pixels(image: "Image") -> Tensor:
    """A picture's pixels, (1, 3, h, w), scaled as VGG16 was trained with them."""
    import numpy as np
    from PIL.Image import Resampling

    image = image.convert("RGB")
    if (ratio := SIDE / min(image.size)) < 1:
        image = image.resize((round(image.width * ratio), round(image.height * ratio)), Resampling.BOX)
    shift, scale = (torch.tensor(v)[:, None, None] for v in (_SHIFT, _SCALE))
    return ((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 - shift) / scale)[None]
