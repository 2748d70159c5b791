"""The encoders that pictures and prompts are compared by: a ViT with a class token, such as DINO, and CLIP, opened by transformers."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raybooth.errors import RayboothError, reason

if TYPE_CHECKING:
    from PIL.Image import Image

Pictures = Callable[["Sequence[Image]"], dict[str, Tensor]]
Words = Callable[[Sequence[str]], dict[str, Tensor]]
_AGAIN = "copy or download it again, or name another one in [evaluate]."


def vit(folder: Path, device: str = "cpu") -> Pictures:
    """A function from pictures to `dino` (n, width), the class token, and `patches` (n, patches, width); rows of length 1."""
    from transformers import AutoModel

    model, prepare = _opened(AutoModel, folder, device), _processor(folder, device)

    @torch.inference_mode()
    def encode(images: "Sequence[Image]") -> dict[str, Tensor]:
        tokens = F.normalize(model(prepare(images)).last_hidden_state, dim=-1)
        registers = getattr(model.config, "num_register_tokens", 0)  # in some DINOv2 models
        return {"dino": tokens[:, 0], "patches": tokens[:, 1 + registers :]}

    return _checked(encode, folder)


def clip(folder: Path, device: str = "cpu") -> tuple[Pictures, Words]:
    """Functions from pictures and from prompts to `clip` (n, width), rows of length 1."""
    from transformers import AutoTokenizer, CLIPModel

    model, prepare = _opened(CLIPModel, folder, device), _processor(folder, device)
    with _explained(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def pictures(images: "Sequence[Image]") -> dict[str, Tensor]:
        return {"clip": F.normalize(model.visual_projection(model.vision_model(prepare(images)).pooler_output), dim=-1)}

    @torch.inference_mode()
    def words(prompts: Sequence[str]) -> dict[str, Tensor]:
        length = model.config.text_config.max_position_embeddings
        ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids.to(device)
        return {"clip": F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)}

    return _checked(pictures, folder), _checked(words, folder)


def _checked(encode: Callable[[Any], dict[str, Tensor]], folder: Path) -> Callable[[Any], dict[str, Tensor]]:
    """`encode`, reporting files that do not go together, which shows only when something is encoded. Errors of the machine or CUDA are not put down to them."""

    def checked(things: Any) -> dict[str, Tensor]:
        with _explained(folder):
            found = encode(things)
        if not all(rows.isfinite().all() for rows in found.values()):
            raise RayboothError(f"The encoder in {folder} makes numbers that are not finite, its weights are damaged: {_AGAIN}")
        return found

    return checked


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RayboothError(f"The encoder in {folder} has files that do not go together ({reason(error)}): {_AGAIN}") from error


def _opened(kind: Any, folder: Path, device: str) -> Any:
    """The model in `folder`, in float32.

    Raises:
        RayboothError: if weights are missing, or of other shapes, which transformers would draw at random.
    """
    with _explained(folder):
        model, found = kind.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )  # fmt: skip
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))  # it is not used, and DINO has none
    if missing:
        raise RayboothError(f"The encoder in {folder} lacks the weights of {missing[0]}: {_AGAIN}")
    if found["mismatched_keys"]:
        name = sorted(str(key[0]) for key in found["mismatched_keys"])[0]
        raise RayboothError(f"The encoder in {folder} has weights of another shape than its config.json says ({name}): {_AGAIN}")
    return model.eval().to(device)


def _processor(folder: Path, device: str) -> "Callable[[Sequence[Image]], Tensor]":
    """A function that resizes and normalises pictures as the model's own configuration says, by PIL, which needs no torchvision."""
    from transformers import AutoImageProcessor

    with _explained(folder):
        processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return lambda images: processor(images=[im.convert("RGB") for im in images], return_tensors="pt").pixel_values.to(device)
