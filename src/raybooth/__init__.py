"""raybooth: DreamBooth for Stable Diffusion on Ray.

import raybooth
run = raybooth.run(raybooth.Config(subject={"photos": "./my-dog", "class": "dog"}))
run.images("output")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raybooth.api import class_images, connect, encode, evaluate, export, finetune, generate, import_lora, plan, prepare, report, run, scores, token
    from raybooth.config import Config
    from raybooth.errors import RayboothError
    from raybooth.loading import load
    from raybooth.session import Run

__version__ = "0.1.0"
__all__ = [
    "Config", "RayboothError", "Run",
    "class_images", "connect", "encode", "evaluate", "export", "finetune", "generate", "import_lora", "load", "plan", "prepare", "report", "run",
    "scores", "token",
]  # fmt: skip

_HOMES = {"Config": "raybooth.config", "RayboothError": "raybooth.errors", "load": "raybooth.loading", "Run": "raybooth.session"}


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Import a name on first use: `raybooth --help` must not wait for Ray."""
    if name not in __all__:
        raise AttributeError(f"module 'raybooth' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(_HOMES.get(name, "raybooth.api")), name)
    globals()[name] = value
    return value
