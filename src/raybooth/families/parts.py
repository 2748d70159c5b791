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
    """A model folder's parsed configuration by its name, such as "unet/config"."""
    return read_object(folder / f"{name}.json")


def configured(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """Wrap `read`: what it does not find in a model folder's configurations, or finds to be of another kind, becomes a RayboothError."""

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
    size = net["sample_size"]
    side = min(size) if isinstance(size, list) else size  # some have (height, width)
    return Facts(side * downscale, vae["latent_channels"], downscale, net.get("patch_size", 1))


def load(family: Family, folder: Path, parts: Sequence[str], dtype: "torch.dtype | None" = None) -> Loaded:
    """The named parts and all tokenizers, in evaluation mode, without gradients; the VAE always in float32: it overflows in less.

    Raises:
        RayboothError: naming the part, if one cannot be opened or lacks weights.
    """
    import torch

    index, modules, tokenizers = read_index(folder), {}, {}
    for part in parts:
        with explained(folder / part), quietly():
            modules[part] = _weighted(_kind(index, part), folder / part, torch.float32 if part == "vae" else dtype or torch.float32)
    for name in (n for n in index if n.startswith("tokenizer") and index[n][0]):
        tokenizers[name] = tokenizer(folder, name, index)
    with explained(folder / "scheduler"):
        objective = family.objective(folder)
    return Loaded(folder, family.facts(folder), objective, modules, tokenizers)


def tokenizer(folder: Path, name: str, index: dict[str, Any]) -> Any:
    """The named tokenizer. It reads no more tokens than its text encoder has places for, if that says how many: its own files need not.

    Raises:
        RayboothError: if it cannot be opened, reads no words, or has tokens that its text encoder does not know.
    """
    path = folder / name.replace("tokenizer", "text_encoder") / "config.json"
    encoder = read_object(path) if path.exists() else {}
    with explained(folder / name):
        read = _kind(index, name).from_pretrained(folder / name)
        if places := encoder.get("max_position_embeddings"):
            read.model_max_length = min(read.model_max_length, places)
        # At a short length: a tokenizer that does not say how much it reads would pad without end.
        nothing, word = read(["", "dog"], padding="max_length", max_length=min(read.model_max_length, 77), truncation=True).input_ids
        if nothing == word:
            raise ValueError("it reads nothing of a prompt")
        # Without the tokens that people add: not all who do enlarge the encoder, and few prompts hold them.
        if read.vocab_size > (known := encoder.get("vocab_size", read.vocab_size)):
            raise ValueError(f"it has {read.vocab_size} tokens, and its text encoder knows {known}")
    return read


@contextlib.contextmanager
def explained(part: Path) -> Iterator[None]:
    """Raise whatever the libraries say of files that do not fit together as a RayboothError that names the part; lack of memory passes as it is."""
    try:
        yield
    except RayboothError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise RayboothError(f"{part} of the model cannot be opened ({reason(error)}): copy or download the model again, or choose another.") from error


def _weighted(kind: Any, folder: Path, dtype: "torch.dtype") -> "nn.Module":
    """A part with all its weights; missing ones are refused (ValueError), as the libraries would draw them at random."""
    key = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    module, found = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **{key: dtype})
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it lacks the weights of {missing[0]}")
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers from showing a progress bar for every file that is read or written."""
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
        nn.Module.to(modules[part], dtype)  # diffusers' own warns that weights should be loaded in that precision, and there are none
        modules[part].eval().requires_grad_(False)
    return Loaded(folder, family.facts(folder), family.objective(folder), modules, {})


def _kind(index: dict[str, Any], part: str) -> Any:
    """The class that model_index.json names for a part, from one of these two libraries, whatever it says."""
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
        # By the signature and not by the index, which may leave out optional parts: the call needs them all.
        wanted = [k for k, p in inspect.signature(kind.__init__).parameters.items() if k != "self" and p.default in (p.empty, None)]
        loaded.kept["text"] = kind(**{k: have.get(k) if k.startswith(("text_encoder", "tokenizer")) else None for k in wanted})
    return loaded.kept["text"]


def save(base: Path, trained: "Mapping[str, nn.Module]", target: Path) -> None:
    """Write a pipeline that plain diffusers opens to `target`: what was trained, and copies of the rest."""
    import torch

    index = read_index(base)
    for part in [k for k, v in index.items() if isinstance(v, list) and v[0] and (base / k).is_dir()]:
        if part in trained:
            module: Any = trained[part]
            if index[part][0] == "transformers":  # which opens weights in the precision they are saved in, and diffusers its own in float32
                module = module.to("cpu", dtype=torch.float32)
            module.save_pretrained(target / part)
            _forget_origin(target / part / "config.json")
        else:
            shutil.copytree(base / part, target / part, dirs_exist_ok=True)
    # No safety checker: its weights are neither among what was fine-tuned nor among what was fetched.
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    index |= {k: [None, None] for k in ("safety_checker", "feature_extractor", "image_encoder") if k in index}
    index.pop("_name_or_path", None)
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    name_as_ever(target)


def name_as_ever(folder: Path) -> None:
    """Put `text_model.` back in front of the names in saved CLIP text encoders: transformers 5.6 leaves it out, unless it has read it.

    Earlier versions and other programs look for it; the former take random weights where they do not find it.
    """
    from safetensors.torch import load_file, save_file

    for part in folder.glob("text_encoder*"):
        if config(folder, f"{part.name}/config").get("architectures") == ["CLIPTextModel"]:
            for file in part.glob("*.safetensors"):
                tensors = load_file(file)
                if not all(name.startswith("text_model.") for name in tensors):
                    save_file({f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}, file, {"format": "pt"})


def _forget_origin(path: Path) -> None:
    """Drop the folder that a part was loaded from: it is nobody's business, and would make equal results differ."""
    values = json.loads(path.read_text())
    values.pop("_name_or_path", None)
    path.write_text(json.dumps(values, indent=2) + "\n")
