"""From a checkpoint in one .safetensors file, as model sites hand them out, to a diffusers folder."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from raybooth.disk import path_of
from raybooth.errors import RayboothError, reason
from raybooth.families import family_of, parts
from raybooth.families.folder import read_index, read_object

SUFFIX = ".safetensors"
_ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoders.")  # prefixes in Stable Diffusion 1.x and 2.x, XL, and later models


def check_kind(file: Path) -> None:
    """Refuse a checkpoint that is not a .safetensors file.

    Raises:
        RayboothError: if it is of another kind: quantised, or such as diffusers would open by pickle.
    """
    if file.suffix == ".gguf":
        raise RayboothError(f"The checkpoint {file} has quantised weights, which are not trained further here: take the model's {SUFFIX} version.")
    if file.suffix != SUFFIX:
        raise RayboothError(
            f"The checkpoint {file} is not a {SUFFIX} file, and others (.ckpt, .pt, .bin) can run any code when they are opened: "
            "take its .safetensors version, or convert it at https://huggingface.co/spaces/safetensors/convert."
        )


def check_whole(file: Path) -> None:
    """Refuse a file that does not hold a whole model of known noise.

    Raises:
        RayboothError: if it is a LoRA, a part of a model, or a model of EDM's noise, which from_single_file would take for Stable Diffusion's.
    """
    names = _shapes(file)
    if any("lora" in name for name in names):
        raise RayboothError(f"{file} is a LoRA and no model: give the model that it was made for, and draw with both after 'raybooth import {file}'.")
    if not any(name.startswith(_ENCODERS) for name in names):
        raise RayboothError(
            f"{file} has no text encoder in it, so it is a part of a model, or what is added to one: give the whole model, as a diffusers folder or a "
            "repository of the hub, with --base."
        )
    if any(name.startswith("edm_") for name in names):
        raise RayboothError(f"The model {file} is of noise as EDM has it, which is not known: choose one that makes noise as Stable Diffusion does.")


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
    family_of(folder)  # refuses what is not known
    kinds = {tensor.dtype for tensor in _shapes(file).values() if tensor.is_floating_point()}
    dtype = kinds.pop() if len(kinds) == 1 else None  # a file in half precision stays as small
    try:
        pipe = kind.from_single_file(str(file), config=str(folder), local_files_only=True, torch_dtype=dtype)
    except (SingleFileComponentError, KeyError, ValueError, RuntimeError, AttributeError, OSError) as error:
        raise RayboothError(
            f"The checkpoint {file} does not fit the configuration {folder} ({reason(error)}): give that of its own architecture with base.configuration."
        ) from None
    pipe.save_pretrained(target, safe_serialization=True)
    parts.name_as_ever(target)
    _settle_prediction(_shapes(file), target / "scheduler" / "scheduler_config.json")


def _settle_prediction(names: Collection[str], scheduler: Path) -> None:
    """Enter in the scheduler's configuration what two empty tensors of a file mark: that its model predicts a velocity, and that it has zero terminal SNR."""
    if "v_pred" not in names:
        return
    held = read_object(scheduler) | {"prediction_type": "v_prediction"}
    if "ztsnr" in names:
        held |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


def _known_configuration(file: Path) -> Path:
    """The configuration files, in the hub's cache, of the model that diffusers takes a file for: nothing is fetched that was not asked for."""
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
    """A file's tensors without data, by name: enough to tell architectures apart. Those in float16, bfloat16 and float32 keep their precision."""
    import torch
    from safetensors import SafetensorError, safe_open

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    try:
        with safe_open(file, "pt") as held:
            slices = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118
            return {name: torch.empty(s.get_shape(), dtype=dtypes.get(s.get_dtype(), torch.int64), device="meta") for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise RayboothError(f"The checkpoint {file} is damaged or cut off ({error}): download it again.") from None
