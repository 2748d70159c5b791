"""The floating-point operations of a training step, counted on tensors without data.

Not counted in a real step: torch's counter makes it take other kernels, whose results differ in the last bits.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raybooth.dataset import dealt
from raybooth.families import Family, Loaded
from raybooth.families.lora import adapters_off
from raybooth.families.parts import decode, unloaded
from raybooth.method import held_in, make_ready
from raybooth.sections import Finetune, Lora, Prior


def without_weights(family: Family, folder: Path, finetune: Finetune, lora: Lora, device: str = "cpu") -> Loaded:
    """The model as a worker has it loaded, on the meta device. `device` is the worker's, which decides the dtype of the weights."""
    with torch.device("meta"):
        loaded = unloaded(family, folder, family.trainable(finetune.text_encoder), held_in(family, finetune, device))
        make_ready(family, loaded, finetune.model_copy(update={"compile": False}), lora, 0)
    return loaded


def passes_of_step(prior: Prior, finetune: Finetune, workers: int) -> list[list[tuple[int, int]]]:
    """The forward passes of each of `workers` in a step, as the training deals them: how many rows, and how many of these are of the class."""
    rows = finetune.batch * (2 if prior.preserves else 1)
    passes = [dealt(rows, rank, workers, finetune.accumulate) for rank in range(workers)]
    return [[(len(places), sum(place >= finetune.batch for place in places)) for places in worker] for worker in passes]


def step_flops(family: Family, loaded: Loaded, prior: Prior, finetune: Finetune, side: int, workers: int) -> int:
    """FLOPs of one optimizer step of all `workers`: forward and backward passes, a multiplication and an addition as two.

    `loaded` is as without_weights() makes it, `side` a picture's in pixels.
    """
    group = passes_of_step(prior, finetune, workers)
    prompts = 2 if any(of_class for worker in group for _, of_class in worker) else 1
    # Every worker encodes the step's prompts, once for all its passes.
    passes = Counter((*share, 0 if i else prompts) for worker in group for i, share in enumerate(worker))
    return sum(n * _pass_flops(family, loaded, prior, finetune, side, *share) for share, n in passes.items())


def _pass_flops(family: Family, loaded: Loaded, prior: Prior, finetune: Finetune, side: int, rows: int, of_class: int, prompts: int) -> int:
    trained = family.trainable(finetune.text_encoder)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if prior.teacher and of_class:
            with torch.no_grad(), adapters_off(loaded.modules[part] for part in trained):
                loss_without_data(family, loaded, trained, of_class, side, prompts=0)  # the teacher has encoded its prompts once for the run
        loss_without_data(family, loaded, trained, rows, side, prompts).backward()
    return counter.get_total_flops()


def picture_flops(family: Family, loaded: Loaded, side: int, guided: bool) -> tuple[int, int]:
    """FLOPs of one picture: of a denoising step, and of its decoding. `loaded`, with its VAE, is on the meta device."""
    facts, rows = loaded.facts, 2 if guided and not loaded.facts.embeds_guidance else 1
    denoiser = next(loaded.modules[family.denoiser].parameters())
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as step:
        text = {k: torch.zeros(rows, *s, dtype=denoiser.dtype) for k, s in family.conditioning(loaded.folder).items()}
        family.predict(loaded, torch.zeros(rows, *facts.latent_shape(side), dtype=denoiser.dtype), torch.zeros(rows), text)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as decoding:
        decode(loaded, torch.zeros(1, *facts.latent_shape(side)))
    return step.get_total_flops(), decoding.get_total_flops()


def loss_without_data(family: Family, loaded: Loaded, trained: tuple[str, ...], rows: int, side: int, prompts: int = 2) -> Tensor:
    """A scalar that depends on all trained parts as the loss does, for `rows` rows and `prompts` prompts to encode, on the default device."""
    shape, conditioning = loaded.facts.latent_shape(side), family.conditioning(loaded.folder)
    dtype = next(loaded.modules[family.denoiser].parameters()).dtype
    of_rows = torch.zeros(rows, dtype=torch.long)  # rows share the conditioning of two prompts, and its gradients
    text = {k: torch.zeros(2, *s, dtype=dtype, requires_grad=len(trained) > 1)[of_rows] for k, s in conditioning.items()}
    out = family.predict(loaded, torch.zeros(rows, *shape, dtype=dtype), torch.zeros(rows), text)
    loss = out.float().square().mean()
    for part in trained[1:] if prompts else ():  # above, the encoders' output is taken as given; here they run, and are trained
        encoder: Any = loaded.modules[part]
        loss = loss + encoder(torch.zeros(prompts, encoder.config.max_position_embeddings, dtype=torch.long))[0].float().mean()
    return loss
