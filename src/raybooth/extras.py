"""Packages that only some settings need, each an extra of raybooth's named after the setting's value."""

import importlib.util

from raybooth.errors import RayboothError
from raybooth.sections import Finetune

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "wandb": "wandb", "mlflow": "mlflow"}


def check_installed(finetune: Finetune) -> None:
    """Check that this machine has the packages that the fine-tuning needs.

    Raises:
        RayboothError: if it lacks one.
    """
    for setting, name in [("finetune.optimizer", finetune.optimizer), *(("finetune.trackers", name) for name in finetune.trackers)]:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise missing(setting, name)


def missing(setting: str, name: str) -> RayboothError:
    return RayboothError(f"{setting} = '{name}' needs {PACKAGES[name]}, which is not installed: pip install 'raybooth[{name}]', or choose another.")
