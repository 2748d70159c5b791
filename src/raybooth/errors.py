"""The one error people are meant to read, how a lack of memory is told, and what helps."""


class RayboothError(Exception):
    """Something the user can put right. The text is one sentence or two: what, what is wrong with it, what to do.

    The command line prints it and exits with status 2; no traceback.
    """


class NotFiniteError(RayboothError):
    """Some `rows` of a batch came out not finite; the others are not to blame, but are not drawn either."""

    def __init__(self, rows: list[int]):
        super().__init__("What the model draws is not finite (NaN): its weights are damaged, or the guidance is too high for it.")
        self.rows = rows

    def __reduce__(self) -> tuple[type, tuple[list[int]]]:
        return NotFiniteError, (self.rows,)


MUST_BE_SHARED = "on a cluster it must be a mount that all machines have, or a URI such as s3://bucket/run."
"""What a storage must be that the workers turn out not to share."""
LOGS = "what Ray's logs say on the machine that it ran on (/tmp/ray/session_latest/logs)"
"""Where there may be more about a worker that died."""
LESS_MEMORY = (
    "a smaller finetune.batch (or more finetune.accumulate), finetune.method = 'lora' (with finetune.lr = 1e-4), finetune.gradient_checkpointing = true, "
    "finetune.optimizer = 'adamw8bit'. With any of these the fine-tuning begins anew: checkpoints are kept, but "
    "belong to the settings that they were made with."
)
"""What takes less memory, in this order, whether an allocation failed or the machine killed a worker."""

_NO_MEMORY = ("allocate memory", "STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""Words of errors without a type of their own: for the machine's memory, in cuBLAS and cuDNN, at a kernel's launch."""


def reason(error: object) -> str:
    """What a library says is wrong, in one line without its full stop, for a sentence that goes on."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether memory has run out, of a GPU or of the machine. Goes by the name of torch's error, so as not to import torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(mark in str(error) for mark in _NO_MEMORY)
