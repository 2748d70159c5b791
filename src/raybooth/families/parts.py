"""What the families share: loading a folder's parts, latents of a KL autoencoder, saving a pipeline."""

import contextlib
import functools
import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raybooth.errors import RayboothError, lacks_memory, reason
from raybooth.families.base import Facts, Family, Loaded
from raybooth.families.folder import INDEX, read_index, read_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")


def config(folder: Path, name: str) -> dict[str, Any]:
    """A part's parsed configuration, as "unet/config"."""
    return read_object(folder / f"{name}.json")


def configured(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """What `read` does not find in a model folder's configurations, or finds to be of another kind, in a sentence."""

    @functools.wraps(read)
    def checked(folder: Path) -> T:
        try:
            return read(folder)
        except (KeyError, TypeError, ValueError) as error:
            raise RayboothError(f"The configurations of the model {folder} lack something or hold nonsense ({error}): copy or download it again.") from None

    return checked


def facts(folder: Path, denoiser: str) -> Facts:
    vae, net = config(folder, "vae/config"), config(folder, f"{denoiser}/config")
    float(vae.get("scaling_factor", 1))
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    return Facts(net["sample_size"] * downscale, vae["latent_channels"], downscale, net.get("patch_size", 1))


def load(family: Family, folder: Path, parts: Sequence[str], dtype: "torch.dtype | None" = None) -> Loaded:
    """The named parts and all tokenizers, in evaluation mode, without gradients; the VAE in float32 always: it overflows in less.

    Raises:
        RayboothError: naming the part, if one cannot be opened or lacks weights.
    """
    import torch

    index, modules, tokenizers = read_index(folder), {}, {}
    for part in parts:
        with _explained(folder / part), quietly():
            modules[part] = _weighted(_kind(index, part), folder / part, torch.float32 if part == "vae" else dtype or torch.float32)
    for name in (n for n in index if n.startswith("tokenizer") and index[n][0]):
        tokenizers[name] = tokenizer(folder, name, index)
    with _explained(folder / "scheduler"):
        objective = family.objective(folder)
    return Loaded(folder, family.facts(folder), objective, modules, tokenizers)


def tokenizer(folder: Path, name: str, index: dict[str, Any]) -> Any:
    """It reads no more tokens than its text encoder, if that counts them, has places for: its own files need not say how many.

    Raises:
        RayboothError: if it cannot be opened.
    """
    with _explained(folder / name):
        read = _kind(index, name).from_pretrained(folder / name)
    encoder = folder / name.replace("tokenizer", "text_encoder") / "config.json"
    if places := read_object(encoder).get("max_position_embeddings") if encoder.exists() else None:
        read.model_max_length = min(read.model_max_length, places)
    return read


@contextlib.contextmanager
def _explained(part: Path) -> Iterator[None]:
    """Whatever the libraries say of files that do not fit together, with the part that they are of. Want of memory is another matter."""
    try:
        yield
    except RayboothError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise RayboothError(f"{part} of the model cannot be opened ({reason(error)}): copy or download the model again, or choose another.") from error


def _weighted(kind: Any, folder: Path, dtype: "torch.dtype") -> "nn.Module":
    """With all its weights: of those that are missing, the libraries draw some at random."""
    key = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    module, found = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **{key: dtype})
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it lacks the weights of {missing[0]}")
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without a bar of transformers for every file read and written."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def unloaded(family: Family, folder: Path, parts: Sequence[str], dtype: "torch.dtype | None" = None) -> Loaded:
    """The named parts from their configurations alone: the right shapes, and no weights worth having."""
    from torch import nn

    index, modules = read_index(folder), {}
    for part in parts:
        kind = _kind(index, part)
        if index[part][0] == "transformers":
            modules[part] = kind(kind.config_class.from_pretrained(folder / part))
        else:
            modules[part] = kind.from_config(kind.load_config(folder / part))
        nn.Module.to(modules[part], dtype)  # diffusers' own warns that weights are better loaded so, and there are none
        modules[part].eval().requires_grad_(False)
    return Loaded(folder, family.facts(folder), family.objective(folder), modules, {})


def _kind(index: dict[str, Any], part: str) -> Any:
    """The class that model_index.json names; of these two libraries, whatever it says."""
    library, name = index[part]
    return getattr(importlib.import_module("transformers" if library == "transformers" else "diffusers"), name)


def encode_image(loaded: Loaded, pixels: "Tensor") -> "tuple[Tensor, Tensor]":
    """(n, 3, h, w) in [-1, 1] -> mean and std of the posterior, scaled as the denoiser sees it."""
    vae: Any = loaded.modules["vae"]
    posterior = vae.encode(pixels).latent_dist
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    return (posterior.mean - shift) * scale, posterior.std * scale


def decode(loaded: Loaded, latents: "Tensor") -> "Tensor":
    """Latents -> pixels in [-1, 1]."""
    vae: Any = loaded.modules["vae"]
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample


def text_pipeline(loaded: Loaded, name: str) -> Any:
    """diffusers' pipeline with nothing but what it needs to encode prompts, made once."""
    import inspect

    import diffusers

    if "text" not in loaded.kept:
        kind = getattr(diffusers, name)
        have = {**loaded.modules, **loaded.tokenizers}
        # Signature, not index: some parts are optional there, and none may be missing here.
        wanted = [k for k, p in inspect.signature(kind.__init__).parameters.items() if k != "self" and p.default in (p.empty, None)]
        loaded.kept["text"] = kind(**{k: have.get(k) if k.startswith(("text_encoder", "tokenizer")) else None for k in wanted})
    return loaded.kept["text"]


def save(base: Path, trained: "Mapping[str, nn.Module]", target: Path) -> None:
    """A pipeline that plain diffusers opens: what was trained, and copies of the rest."""
    index = read_index(base)
    for part in [k for k, v in index.items() if isinstance(v, list) and v[0] and (base / k).is_dir()]:
        if part in trained:
            module: Any = trained[part]
            module.save_pretrained(target / part)
            _forget_origin(target / part / "config.json")
        else:
            shutil.copytree(base / part, target / part, dirs_exist_ok=True)
    # No safety checker: its weights are no part of what was fine-tuned, nor of what was fetched.
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    index |= {k: [None, None] for k in ("safety_checker", "feature_extractor", "image_encoder") if k in index}
    index.pop("_name_or_path", None)
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    name_as_ever(target)


def name_as_ever(folder: Path) -> None:
    """transformers 5.6 names a CLIP's text tower without `text_model.`, but for one that it read so. Earlier ones, and what reads folders elsewhere, look
    for that, and the former take random weights where they do not find it.
    """
    from safetensors.torch import load_file, save_file

    for part in folder.glob("text_encoder*"):
        if config(folder, f"{part.name}/config").get("architectures") == ["CLIPTextModel"]:
            for file in part.glob("*.safetensors"):
                tensors = load_file(file)
                if not all(name.startswith("text_model.") for name in tensors):
                    save_file({f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}, file, {"format": "pt"})


def _forget_origin(path: Path) -> None:
    """The folder it was loaded from is nobody's business, and would make equal results differ."""
    values = json.loads(path.read_text())
    values.pop("_name_or_path", None)
    path.write_text(json.dumps(values, indent=2) + "\n")
