"""What a model folder must hold, checked before anything is loaded. No torch here: it runs at every start."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raybooth.errors import RayboothError, reason

INDEX = "model_index.json"
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"})
"""The files of a tokenizer's vocabulary: any of these sets will do."""
_AGAIN = "copy or download the model again."
_INCOMPLETE = "it is not complete, copy or download it again."
_WITHOUT = "it is not complete, or was saved without that part, which raybooth needs: give the whole model."
_SHARDS = ".safetensors.index."  # in the name of a list of shards: model.safetensors.index.json, or .fp16.json
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<old>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<new>\w+))?\.safetensors(?:\.index(?:\.(?P<list>\w+))?\.json)?"
)
"""How diffusers and transformers name weights and lists of their shards, with the places where a variant such as fp16 may be named."""
_PREFERRED = ("", "fp32", "fp16", "bf16", "ema", "non_ema")  # variants, no variant first


def read_index(folder: Path) -> dict[str, Any]:
    """The parsed model_index.json.

    Raises:
        RayboothError: if there is none, or it is not JSON.
    """
    if not folder.is_dir():
        raise RayboothError(f"There is no model folder {folder}: give a diffusers folder, a hub repository as owner/name, or 'mini' with --base.")
    if not (folder / INDEX).exists():
        raise RayboothError(f"The model folder {folder} has no {INDEX}: give the folder of a diffusers pipeline, the one that holds unet/ and vae/.")
    return read_object(folder / INDEX)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model.

    Raises:
        RayboothError: if there is none that can be read.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RayboothError(f"{path} is missing: {_AGAIN}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise RayboothError(f"{path} is damaged ({error}): {_AGAIN}") from None
    if not isinstance(held, dict):
        raise RayboothError(f"{path} is damaged (not a JSON object): {_AGAIN}")
    return held


def names_in(folder: Path) -> list[str]:
    """The files of a model folder's parts, such as "unet/config.json", also where a part is a link to a folder elsewhere.

    Raises:
        RayboothError: if a part cannot be looked into.
    """
    try:
        parts = [part for part in folder.iterdir() if part.is_dir()]
        return sorted(f"{part.name}/{file.name}" for part in parts for file in part.iterdir() if file.is_file())
    except OSError as error:
        raise RayboothError(f"The model folder {folder} cannot be read ({error}): make it readable, or copy it.") from None


def needed_files(names: Iterable[str], weights: Iterable[str], settings: Iterable[str], source: str) -> list[str]:
    """The names, among those of a folder or repository, that a pipeline of these parts needs: configurations and safetensors.

    Full-precision weights are preferred to variants, and only one variant is taken.

    Raises:
        RayboothError: if a part has no configuration, vocabulary or weights, or pickled ones only.
    """
    names = sorted(names)
    chosen = [INDEX]
    for part in (*weights, *settings):
        own = [n for n in names if n.startswith(f"{part}/") and n.count("/") == 1]
        if not own:
            raise RayboothError(f"The model {source} has no {part}/ folder: {_WITHOUT}")
        _check_described(part, own, source)
        chosen += [n for n in own if n.endswith((".json", ".txt", ".model")) and _SHARDS not in n]
        if part in weights:
            chosen += _weights_of(part, own, source)
    return chosen


def configuration_of(part: str) -> str:
    """The name of a part's configuration (not of a tokenizer's)."""
    return f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"


def _is_tokenizer(part: str) -> bool:
    return part.startswith("tokenizer")


def _check_described(part: str, own: list[str], source: str) -> None:
    if _is_tokenizer(part):
        if not any({f"{part}/{name}" for name in files} <= set(own) for files in VOCABULARIES):
            known = ", or ".join(" and ".join(sorted(files)) for files in VOCABULARIES)
            raise RayboothError(f"The model {source} has no vocabulary in {part}/ ({known}): {_INCOMPLETE}")
    elif configuration_of(part) not in own:
        raise RayboothError(f"The model {source} has no {configuration_of(part)}: {_INCOMPLETE}")


def _weights_of(part: str, own: list[str], source: str) -> list[str]:
    found: dict[str, list[str]] = {}
    for name in own:
        if (variant := _variant(name)) is not None:
            found.setdefault(variant, []).append(name)
    if found:
        # Only from_pretrained(variant=...) looks for a variant's file name: it is renamed when it is copied.
        chosen = found[next(v for v in (*_PREFERRED, *found) if v in found)]
        if not any(_SHARDS in n for n in chosen) and all(_SHARD.search(n) for n in chosen):
            raise RayboothError(f"The model {source} has weights in shards in {part}/ and no list of them (*.safetensors.index.json): {_AGAIN}")
        return chosen
    if any(n.endswith(PICKLED) for n in own):
        raise RayboothError(
            f"The model {source} has only pickled weights in {part}/, which can run any code when they are opened: "
            "choose a revision with .safetensors files, or convert it at https://huggingface.co/spaces/safetensors/convert."
        )
    raise RayboothError(f"The model {source} has no weights in {part}/ (diffusion_pytorch_model.safetensors or model.safetensors): copy or download it again.")


def check_described(folder: Path, weights: Iterable[str], settings: Iterable[str]) -> None:
    """Refuse a model folder, complete or not, in which some part's class or configuration cannot be read.

    Raises:
        RayboothError: naming the file.
    """
    index = read_index(folder)
    for part in (*weights, *settings):
        match index.get(part):
            case [str(), str()]:
                pass
            case [None, None]:
                raise RayboothError(f"The model {folder} has no {part}/: {_WITHOUT}")
            case _:
                raise RayboothError(f"{folder / INDEX} does not say of which class {part}/ is: {_INCOMPLETE}")
        if not _is_tokenizer(part) and read_object(folder / configuration_of(part)).get("quantization_config"):
            raise RayboothError(f"The model {folder} has quantised weights in {part}/, which are not trained further here: give it in full or half precision.")


def check_files(folder: Path, names: Iterable[str], source: str) -> None:
    """Refuse configurations, vocabularies and lists of shards that are damaged, and lists of shards that are not among `names`.

    Raises:
        RayboothError: naming the file.
    """
    names = list(names)
    for name in names:
        if name.endswith(".json"):
            held = read_object(folder / name)
            if _SHARDS in name:
                missing = sorted({f"{name.rpartition('/')[0]}/{shard}" for shard in _listed(folder / name, held)} - set(names))
                if missing:
                    raise RayboothError(f"The model {source} has no {missing[0]}, which {name} lists: {_INCOMPLETE}")


def _listed(path: Path, held: dict[str, Any]) -> list[str]:
    """The files in a list of shards, one for each tensor."""
    listed = held.get("weight_map")
    if not listed or not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise RayboothError(f"{path} is damaged (no weight_map of file names): {_AGAIN}")
    return list(listed.values())


def plain_name(name: str) -> str:
    """The name without its variant: unet/diffusion_pytorch_model.fp16.safetensors -> ....safetensors."""
    folder, slash, file = name.rpartition("/")
    variant = _variant(file)
    return f"{folder}{slash}{file.replace(f'.{variant}', '', 1)}" if variant else name


def _variant(name: str) -> str | None:
    """The variant of a file of weights or a list of shards, "" if it has none; None for any other file."""
    found = _WEIGHTS.fullmatch(name.rpartition("/")[2])
    return found and (found["old"] or found["new"] or found["list"] or "")


def settle_shards(folder: Path, names: Iterable[str]) -> None:
    """Rewrite lists of shards to name these without their variant, as they are named now."""
    for name in names:
        if _SHARDS in name:
            held = read_object(folder / name)
            held["weight_map"] = {k: plain_name(v) for k, v in held["weight_map"].items()}
            (folder / name).write_text(json.dumps(held), encoding="utf-8")


def check_weights(folder: Path, names: Iterable[str]) -> None:
    """Refuse weights that are cut off or damaged, by their headers.

    Raises:
        RayboothError: naming the file.
    """
    from safetensors import SafetensorError, safe_open

    for name in names:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, "np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise RayboothError(f"The weights {folder / name} are cut off or damaged ({reason(error)}): {_AGAIN}") from None
