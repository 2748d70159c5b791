"""How the parts are trained: whole or by adapters, in which precision and memory format."""

from typing import TYPE_CHECKING, Any

from raybooth.families import Family, Loaded
from raybooth.sections import Finetune, Lora

if TYPE_CHECKING:
    import torch


def make_ready(family: Family, loaded: Loaded, finetune: Finetune, lora: Lora, seed: int) -> None:
    """Make the parts ready for training as `finetune` says; with LoRA they get their adapters, and only these require gradients."""
    import torch

    denoiser: Any = loaded.modules[family.denoiser]
    if finetune.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if finetune.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        for part in family.trainable_encoders if finetune.text_encoder else ():
            encoder: Any = loaded.modules[part]
            encoder.gradient_checkpointing_enable()
    if finetune.compile:
        denoiser.compile()
    trained = family.trainable(finetune.text_encoder)
    if finetune.method == "lora":
        from raybooth.families.lora import add_adapters, spare_copies

        add_adapters(family, loaded, trained, lora, seed)
        for part in trained:
            spare_copies(loaded.modules[part])
    else:
        for part in trained:
            loaded.modules[part].requires_grad_(True)


def held_in(family: Family, finetune: Finetune, device: str) -> "torch.dtype":
    """The dtype of the weights: float32 to be trained, but what the forward pass is cast to under adapters (float32 themselves) and with "bf16-weights"."""
    import torch

    frozen_or_rounded = finetune.method == "lora" or finetune.precision == "bf16-weights"
    return (frozen_or_rounded and autocast_dtype(family, finetune.precision, device)) or torch.float32


def autocast_dtype(family: Family, precision: str, device: str) -> "torch.dtype | None":
    """The dtype that the forward pass is cast to, None for plain float32: "auto" is that, too, if a GPU has only float16 and the family overflows in it."""
    import torch

    if precision == "auto":
        # Measured: where a CPU computes in bfloat16, a step of 100 M parameters takes a third less, of mini a tenth; where it does not, ten times as long.
        if device == "cpu":
            return torch.bfloat16 if bfloat16_of_cpu() else None
        if device != "cuda":
            return None
        if has_bfloat16():
            return torch.bfloat16
        return torch.float16 if family.half == "float16" else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16-weights": torch.bfloat16}[precision]


def drawing_dtype(family: Family, device: str, bfloat16: bool) -> "torch.dtype":
    """The dtype to draw in: on a GPU the family's half precision, which halves the time there; else, and on a GPU that lacks it, float32."""
    import torch

    possible = device == "cuda" and (bfloat16 or family.half == "float16")
    return getattr(torch, family.half) if possible else torch.float32


def bfloat16_of_cpu() -> list[str]:
    """The instructions by which this machine's processor computes in bfloat16; none if this torch cannot tell."""
    import torch

    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [name.upper().replace("_", "-") for name in ("avx512_bf16", "amx_bf16") if can.get(name)]


def has_bfloat16() -> bool:
    """Whether the GPU has bfloat16. True without a GPU: plans then assume one of today's, which have it."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
