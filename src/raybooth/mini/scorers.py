"""mini's scorers: a CLIP for pictures against words, a ViT for who it is (the DINO of this world)."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from raybooth.mini import FOLDER
from raybooth.mini.pen import SIZE


class Scorers:
    """Features of pictures and prompts, each (n, width) with rows of length 1."""

    def __init__(self, folder: Path = FOLDER):
        self.folder = folder

    @cached_property
    def _clip(self) -> CLIPModel:
        return CLIPModel.from_pretrained(self.folder / "clip", dtype=torch.float32).eval()

    @cached_property
    def _vit(self) -> ViTModel:
        return ViTModel.from_pretrained(self.folder / "vit", dtype=torch.float32, add_pooling_layer=False).eval()

    @cached_property
    def _tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer")

    @torch.inference_mode()
    def identity(self, images: Sequence[Image.Image]) -> Tensor:
        return F.normalize(self._vit(_pixels(images)).last_hidden_state[:, 0], dim=-1)

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        clip = self._clip
        return F.normalize(clip.visual_projection(clip.vision_model(_pixels(images)).pooler_output), dim=-1)

    @torch.inference_mode()
    def prompts(self, texts: Sequence[str]) -> Tensor:
        clip = self._clip
        ids = self._tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return F.normalize(clip.text_projection(clip.text_model(ids).pooler_output), dim=-1)


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    """(n, 3, 64, 64) in [-1, 1], whatever the pictures' size."""
    small = [im.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for im in images]
    return torch.from_numpy(np.stack([np.asarray(im) for im in small])).permute(0, 3, 1, 2).float() / 127.5 - 1
