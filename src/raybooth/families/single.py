"""A checkpoint in one .safetensors file, as model sites hand them out, to a diffusers folder."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from raybooth.disk import path_of
from raybooth.errors import RayboothError
from raybooth.families import parts
from raybooth.families.folder import read_index, read_object

SUFFIX = ".safetensors"


def check_kind(file: Path) -> None:
    """
    Raises:
        RayboothError: if it is a checkpoint of another kind, which diffusers would open by pickle.
    """
    if file.suffix != SUFFIX:
        raise RayboothError(
            f"The checkpoint {file} is not a {SUFFIX} file, and others (.ckpt, .pt, .bin) can run any code when they are opened: "
            "take its .safetensors version, or convert it at https://huggingface.co/spaces/safetensors/convert."
        )


def refuse_lora(file: Path) -> None:
    """
    Raises:
        RayboothError: if it is one.
    """
    if any("lora" in name for name in _shapes(file)):
        raise RayboothError(f"{file} is a LoRA and no model: give the model that it was made for, and draw with both after 'raybooth import {file}'.")


def unpack(file: Path, configuration: str | None, target: Path) -> None:
    """Write `file` as a diffusers folder into `target`, by diffusers' from_single_file.

    Args:
        configuration: a folder with the configuration files of a model of the same architecture, which the file lacks; by
            default those of the repository that diffusers takes it for, if they are on this machine.

    Raises:
        RayboothError: if the file is damaged, its configuration is not here, or the two do not belong together.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    folder = path_of(configuration, "base.configuration") if configuration else _known_configuration(file)
    name = read_index(folder).get("_class_name", "")
    kind: Any = getattr(diffusers, name, None)
    if not hasattr(kind, "from_single_file"):
        raise RayboothError(
            f"base.configuration = '{folder}' is of a {name}, which diffusers does not read from single files: give the folder of another model."
        )
    try:
        pipe = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    except (SingleFileComponentError, KeyError, ValueError, RuntimeError, AttributeError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RayboothError(
            f"The checkpoint {file} does not fit the configuration {folder} ({reason}): give that of its own architecture with base.configuration."
        ) from None
    pipe.save_pretrained(target, safe_serialization=True)
    parts.name_as_ever(target)
    _settle_prediction(_shapes(file), target / "scheduler" / "scheduler_config.json")


def _settle_prediction(names: Collection[str], scheduler: Path) -> None:
    """Two empty tensors mark a file whose model predicts a velocity, and one whose noise ends in nothing but noise: no configuration knows of them."""
    if "v_pred" not in names:
        return
    held = read_object(scheduler) | {"prediction_type": "v_prediction"}
    if "ztsnr" in names:
        held |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


def _known_configuration(file: Path) -> Path:
    """In the hub's cache: nothing is fetched that was not asked for."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    shapes = _shapes(file)
    if infer_diffusers_model_type(shapes) == "v2":
        raise RayboothError(
            f"The checkpoint {file} is a Stable Diffusion 2.x, and does not say whether it predicts noise (512 pixels: 2-base, 2-1-base) or a velocity "
            "(768 pixels: 2, 2-1): set base.configuration to a folder with the configuration files of the one that it was made from."
        )
    repo = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repo, local_files_only=True, allow_patterns=["*.json", "*.txt", "*.model"]))
    except (LocalEntryNotFoundError, OSError):
        raise RayboothError(
            f"The checkpoint {file} looks like {repo}, and the configuration files of that model are not on this machine: "
            "set base.configuration to a folder that has them, or fetch them with "
            f'\'hf download {repo} --include "*.json" --include "*.txt" --include "*.model"\'.'
        ) from None


def _shapes(file: Path) -> dict[str, Any]:
    """Tensors without data, by name: enough to tell architectures apart."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as held:
            return {name: torch.empty(held.get_slice(name).get_shape(), device="meta") for name in held.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RayboothError(f"The checkpoint {file} is damaged or cut off ({error}): download it again.") from None
