"""What a model folder must hold, checked before anything is loaded. No torch here: it runs at every start."""

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raybooth.errors import RayboothError

INDEX = "model_index.json"
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_SHARDS = ".safetensors.index."  # of a list of shards: model.safetensors.index.json, or .fp16.json
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema|ema)\.|\.(fp16|bf16)-")


def read_index(folder: Path) -> dict[str, Any]:
    """The parsed model_index.json.

    Raises:
        RayboothError: if there is none, or it is not JSON.
    """
    if not folder.is_dir():
        raise RayboothError(f"There is no model folder {folder}: give a diffusers folder, a hub repository as owner/name, or 'mini' with --base.")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RayboothError(f"The model folder {folder} has no {INDEX}: give the folder of a diffusers pipeline, the one that holds unet/ and vae/.") from None
    except (ValueError, OSError) as error:
        raise RayboothError(f"{folder / INDEX} is damaged ({error}): copy or download the model again.") from None
    if not isinstance(index, dict):
        raise RayboothError(f"{folder / INDEX} is damaged (not a JSON object): copy or download the model again.")
    return index


def needed_files(names: Iterable[str], weights: Iterable[str], settings: Iterable[str], source: str) -> list[str]:
    """Of a folder's or repository's file names, those a pipeline of these parts needs: configurations and safetensors.

    Full-precision weights are preferred to variants; of a variant there is one.

    Raises:
        RayboothError: if a part has no weights, or pickled ones only.
    """
    names = sorted(names)
    chosen = [INDEX]
    for part in (*weights, *settings):
        own = [n for n in names if n.startswith(f"{part}/") and n.count("/") == 1]
        if not own:
            raise RayboothError(f"The model {source} has no {part}/ folder: it is not complete, copy or download it again.")
        chosen += [n for n in own if n.endswith((".json", ".txt", ".model")) and _SHARDS not in n]
        if part in weights:
            chosen += _weights_of(part, own, source)
    return chosen


def _weights_of(part: str, own: list[str], source: str) -> list[str]:
    tensors = [n for n in own if n.endswith(".safetensors") or _SHARDS in n]
    full = [n for n in tensors if not _VARIANT.search(n)]
    if full or tensors:
        # A variant's file name is what from_pretrained(variant=...) looks for; it is renamed when it is copied.
        return full or [n for n in tensors if ".fp16" in n] or tensors
    if any(n.endswith(PICKLED) for n in own):
        raise RayboothError(
            f"The model {source} has only pickled weights in {part}/, which can run any code when they are opened: "
            "choose a revision with .safetensors files, or convert it at https://huggingface.co/spaces/safetensors/convert."
        )
    raise RayboothError(f"The model {source} has no weights in {part}/ (no .safetensors file): copy or download it again.")


def plain_name(name: str) -> str:
    """The name without its variant: unet/diffusion_pytorch_model.fp16.safetensors -> ....safetensors."""
    return _VARIANT.sub(lambda m: "-" if m.group(0).endswith("-") else ".", name)


def settle_shards(folder: Path, names: Iterable[str]) -> None:
    """Lists of shards name them without their variant, as they are now."""
    for name in names:
        if _SHARDS in name:
            held = json.loads((folder / name).read_text(encoding="utf-8"))
            held["weight_map"] = {k: plain_name(v) for k, v in held["weight_map"].items()}
            (folder / name).write_text(json.dumps(held), encoding="utf-8")


def check_weights(folder: Path, names: Iterable[str]) -> None:
    """Refuse weights that are cut off or damaged, by their headers.

    Raises:
        RayboothError: naming the file.
    """
    for name in names:
        if name.endswith(".safetensors"):
            problem = _safetensors_problem(folder / name)
            if problem:
                raise RayboothError(f"The weights {folder / name} are {problem}: copy or download the model again.")


def _safetensors_problem(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        if len(head) < 8:
            return f"cut off after {size} bytes"
        length = struct.unpack("<Q", head)[0]
        if length > min(size, 100_000_000):
            return "cut off or not safetensors"
        try:
            header = json.loads(f.read(length))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return "not readable as safetensors"
    if size != 8 + length + end:
        return f"cut off: {size} bytes of {8 + length + end}"
    return None
