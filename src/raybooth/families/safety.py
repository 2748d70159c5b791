"""The safety checker that Stable Diffusion 1.x brings along: which pictures not to show."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.families.folder import PICKLED

if TYPE_CHECKING:
    from PIL.Image import Image

PARTS = ("safety_checker", "feature_extractor")


def needed(names: list[str]) -> list[str]:
    """The checker's files among those of a repository or folder: configurations and safetensors in full precision."""
    own = [n for n in names if n.partition("/")[0] in PARTS and n.count("/") == 1]
    return [n for n in own if not n.endswith(PICKLED) and ".fp16." not in n and n.endswith((".json", ".safetensors"))]


def checker(folder: Path, device: str) -> "Callable[[list[Image]], list[bool]]":
    """PIL pictures -> whether each is unsafe, by `folder`'s safety_checker/ and feature_extractor/."""
    import numpy as np
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import AutoImageProcessor

    model: Any = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker", use_safetensors=True, dtype=torch.float32)
    model = model.eval().to(device)
    prepare: Any = AutoImageProcessor.from_pretrained(folder / "feature_extractor", backend="pil")

    def unsafe(images: "list[Image]") -> list[bool]:
        found: list[bool] = []
        for image in images:  # one by one, as everywhere: a verdict must not depend on the neighbours
            pixels = prepare(images=[image], return_tensors="pt").pixel_values.to(device)
            found += model(clip_input=pixels, images=np.zeros((1, 1, 1, 3)))[1]  # it would blacken the pictures it is given
        return found

    return unsafe
