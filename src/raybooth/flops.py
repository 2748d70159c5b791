"""The floating-point operations of a training step, counted on tensors without data.

Not in a real step: torch's counter makes it take other kernels, whose results differ in the last bits.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raybooth.config import Finetune, Lora, Prior
from raybooth.families import Family, Loaded
from raybooth.families.lora import adapters_off
from raybooth.families.parts import unloaded
from raybooth.method import held_in, make_ready


def without_weights(family: Family, folder: Path, finetune: Finetune, lora: Lora, device: str = "cpu") -> Loaded:
    """What a worker has loaded, on the meta device. `device` is the worker's: it decides what the weights are held in."""
    with torch.device("meta"):
        loaded = unloaded(family, folder, family.trainable(finetune.text_encoder), held_in(finetune, device))
        make_ready(family, loaded, finetune.model_copy(update={"compile": False}), lora, 0)
    return loaded


def rows_of_pass(prior: Prior, finetune: Finetune, workers: int) -> int:
    """Rows in one forward pass of one of `workers`, at most."""
    with_class_rows = prior.drawn or prior.method == "base-prediction"
    return -(-finetune.batch * (2 if with_class_rows else 1) // workers // finetune.accumulate)


def step_flops(family: Family, loaded: Loaded, prior: Prior, finetune: Finetune, side: int, workers: int) -> int:
    """Of one optimizer step of all `workers`: forward and backward passes, a multiplication and an addition as two.

    `loaded` is as without_weights() makes it, `side` a picture's in pixels.
    """
    rows, trained = rows_of_pass(prior, finetune, workers), family.trainable(finetune.text_encoder)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if prior.method == "base-prediction":
            with torch.no_grad(), adapters_off(loaded.modules[part] for part in trained):
                loss_without_data(family, loaded, trained, -(-rows // 2), side)  # of the class
        loss_without_data(family, loaded, trained, rows, side).backward()
    return counter.get_total_flops() * finetune.accumulate * workers


def loss_without_data(family: Family, loaded: Loaded, trained: tuple[str, ...], rows: int, side: int) -> Tensor:
    """A scalar that follows from all the trained parts, as the loss of `rows` rows does, on the default device."""
    shape, conditioning = loaded.facts.latent_shape(side), family.conditioning(loaded.folder)
    dtype = next(loaded.modules[family.denoiser].parameters()).dtype
    text = {k: torch.zeros(rows, *s, dtype=dtype, requires_grad=len(trained) > 1) for k, s in conditioning.items()}
    out = family.predict(loaded, torch.zeros(rows, *shape, dtype=dtype), torch.zeros(rows), text)
    loss = out.float().square().mean()
    for part in trained[1:]:  # what the encoders give is taken as given above; here they give, and are trained
        encoder: Any = loaded.modules[part]
        loss = loss + encoder(torch.zeros(2, encoder.config.max_position_embeddings, dtype=torch.long))[0].float().mean()
    return loss
