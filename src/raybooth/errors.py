"""The one error people are meant to read, how a want of memory reads, and what helps."""


class RayboothError(Exception):
    """Something the user can put right. The text is one sentence or two: what, what is wrong with it, what to do.

    The command line prints it and exits with status 2; no traceback.
    """


class NotFiniteError(RayboothError):
    """Rows of a batch whose pictures are no pictures; the others are not to blame, and are not drawn either."""

    def __init__(self, rows: list[int]):
        super().__init__("What the model draws is not finite (NaN): its weights are damaged, or the guidance is too high for it.")
        self.rows = rows

    def __reduce__(self) -> tuple[type, tuple[list[int]]]:
        return NotFiniteError, (self.rows,)


MUST_BE_SHARED = "on a cluster it must be a mount that all machines have, or a URI such as s3://bucket/run."
"""What a storage that the workers do not share lacks."""
LOGS = "what Ray's logs say on the machine that it ran on (/tmp/ray/session_latest/logs)"
"""Where more may stand of a worker that died."""
LESS_MEMORY = (
    "a smaller finetune.batch (or more finetune.accumulate), finetune.method = 'lora' (with finetune.lr = 1e-4), finetune.gradient_checkpointing = true, "
    "finetune.optimizer = 'adamw8bit'. With any of these the fine-tuning begins anew: checkpoints are kept, but "
    "belong to the settings that they were made with."
)
"""What takes less, in this order: whether it was an allocation that failed, or the machine that killed a worker."""

_NO_MEMORY = ("allocate memory", "STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""Where it is no error of its own kind: of the machine's memory, in cuBLAS and cuDNN, in a kernel's launch."""


def reason(error: object) -> str:
    """What a library says is wrong, in one line without its full stop, for a sentence that goes on."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether memory has run out, of a GPU or of the machine. By the name of torch's error: nothing waits for torch here."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(mark in str(error) for mark in _NO_MEMORY)
