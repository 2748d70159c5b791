"""How the parts are trained: whole or by adapters, in which precision and memory format."""

from typing import TYPE_CHECKING, Any

from raybooth.families import Family, Loaded
from raybooth.sections import Finetune, Lora

if TYPE_CHECKING:
    import torch


def make_ready(family: Family, loaded: Loaded, finetune: Finetune, lora: Lora, seed: int) -> None:
    """The parts in training as `finetune` has them; with LoRA they get their adapters, and only these require gradients."""
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
    """What weights are held in: float32 to be trained, what the forward pass is cast to under adapters, which are float32 themselves."""
    import torch

    frozen_or_rounded = finetune.method == "lora" or finetune.precision == "bf16-weights"
    return (frozen_or_rounded and autocast_dtype(family, finetune.precision, device)) or torch.float32


def autocast_dtype(family: Family, precision: str, device: str) -> "torch.dtype | None":
    """What the forward pass is cast to; None for plain float32, which "auto" is for a family that overflows in float16 on a GPU that has nothing else."""
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
    """The family's half precision on a GPU, where it halves the time; float32 on a CPU, where it does not, and on a GPU without `bfloat16` that needs it."""
    import torch

    possible = device == "cuda" and (bfloat16 or family.half == "float16")
    return getattr(torch, family.half) if possible else torch.float32


def bfloat16_of_cpu() -> list[str]:
    """The instructions by which this machine's processor computes in bfloat16; none if this torch cannot tell."""
    import torch

    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [name.upper().replace("_", "-") for name in ("avx512_bf16", "amx_bf16") if can.get(name)]


def has_bfloat16() -> bool:
    """Whether the GPU has it. Where there is none to ask, this is a plan for one, and today's do."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
