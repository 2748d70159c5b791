"""What runs inside workers: plain callables that know nothing of Ray. Each reads the storage and returns bytes or facts.

torch is imported where it is used: Ray unpickles these functions in its driver and its controllers too, which never call them.
"""

import contextlib
import functools
import io
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from raybooth.errors import MUST_BE_SHARED, RayboothError, lacks_memory
from raybooth.families import Family, Loaded, family_of
from raybooth.families.folder import INDEX
from raybooth.manifest import digest, model_digest
from raybooth.pictures import png
from raybooth.sections import Sampling
from raybooth.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
Row = dict[str, Any]
Work = Callable[[list[Row]], list[bytes]]


@contextlib.contextmanager
def explained_if_out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Raise one RayboothError with `advice` if `what` ran out of memory, of a GPU or of the machine; other errors are left as they are."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
        if not lacks_memory(error):
            raise
        raise RayboothError(f"{what} ran out of memory. What needs less, in this order: {advice}") from error


FITS_NOT = (
    "fewer workers (cluster.samplers) where they share a machine, a smaller model, a machine or a GPU with more. 'raybooth plan' says what a model takes."
)
"""Advice where the model itself does not fit: no way of using it makes it smaller."""
SMALLER_ENCODERS = "fewer cluster.samplers where they share a machine, smaller models as evaluate.dino and evaluate.clip."


def _explained(what: str, advice: str, too_large: str = FITS_NOT) -> Callable[[Callable[P, Work]], Callable[P, Work]]:
    """A decorator for a function that makes work: explains a lack of memory in the making, which loads a model, and in the work."""

    def decorated(make: Callable[P, Work]) -> Callable[P, Work]:
        @functools.wraps(make)
        def made(*args: P.args, **kwargs: P.kwargs) -> Work:
            with explained_if_out_of_memory(f"{what}, at the loading of the model,", too_large):
                work = make(*args, **kwargs)
            return explained_if_out_of_memory(what, advice)(work)

        return made

    return decorated


def stage_folder(storage: str, stage: str) -> Path:
    workspace = Workspace(storage)
    workspace.pull(stage)  # where the storage is remote: once per machine
    return workspace.root / stage


def pipeline_stage(workspace: Workspace, model_stage: str) -> str:
    """The stage whose pipeline draws for the model of `model_stage`: that one itself, or "base-model" for adapters and checkpoints, which are put on it."""
    return model_stage if INDEX in workspace.manifest(model_stage)["outputs"] else "base-model"


def drawing_digest(workspace: Workspace, stage: str) -> str:
    """Digest of all that the model of a stage draws with; for adapters and checkpoints that includes the base model, on which they are put.

    Raises:
        RayboothError: if the base model in the storage is not theirs.
    """
    manifest, pipeline = workspace.manifest(stage), pipeline_stage(workspace, stage)
    if pipeline == stage:
        return model_digest(manifest)
    base = model_digest(workspace.manifest(pipeline))
    if manifest.get("inputs", {}).get("model", base) != base:
        raise RayboothError(
            f"{stage} in the storage {workspace.storage} belongs to another base model than the one that lies there now: "
            f"run {workspace.command('prepare')} with the base model of before, or {workspace.command('run')} to fine-tune this one."
        )
    return digest([model_digest(manifest), base])


def _check_shared(storage: str, stage: str, model: str) -> None:
    """Refuse a storage that is not the driver's.

    Raises:
        RayboothError: if the stage's model on this machine is not the driver's `model` (its digest).
    """
    workspace = Workspace(storage)
    workspace.pull(stage)  # a storage that cannot be reached is another error
    try:
        found = drawing_digest(workspace, stage)
    except RayboothError:
        found = ""
    if found != model:
        raise RayboothError(f"The storage {storage} on {socket.gethostname()} is not the one of this run: {MUST_BE_SHARED}")


def for_inference(folder: Path, parts: Iterable[str]) -> Loaded:
    """The model in `folder` to draw and encode with, on the GPU if there is one."""
    import torch

    from raybooth.families.parts import load
    from raybooth.method import drawing_dtype, has_bfloat16

    family, device = family_of(folder), "cuda" if torch.cuda.is_available() else "cpu"
    return load(family, folder, tuple(parts), drawing_dtype(family, device, has_bfloat16())).to(device)


def opened(storage: str, model_stage: str) -> tuple[Family, Loaded]:
    """The family and model of a stage for drawing: a pipeline, or adapters or a checkpoint on the base that they belong to."""
    from raybooth.checkpoint import TENSORS
    from raybooth.families.lora import WEIGHTS, load_adapters
    from raybooth.restore import restore

    folder, base = stage_folder(storage, model_stage), stage_folder(storage, pipeline_stage(Workspace(storage), model_stage))
    family = family_of(base)
    loaded = for_inference(base, (family.denoiser, "vae", *family.encoders))
    if (folder / WEIGHTS).exists():
        load_adapters(family, loaded, folder)
    if (folder / TENSORS).exists():
        restore(family, loaded, folder)
    return family, loaded


@_explained("Drawing", "a smaller cluster.sample_batch, fewer cluster.samplers where they share a machine, a smaller base.resolution.")
def sampler(storage: str, model_stage: str, sampling: Sampling, batch: int, model: str) -> Work:
    """Work that draws rows of (prompt, seed) as PNG files, which carry prompt, seed and `model`, the digest of what draws."""
    from PIL import Image

    from raybooth.sample import Sampler

    _check_shared(storage, model_stage, model)
    draw = Sampler(*opened(storage, model_stage), sampling, batch).draw

    def work(rows: list[Row]) -> list[bytes]:
        pictures = draw([r["prompt"] for r in rows], [r["seed"] for r in rows])
        return [
            png(Image.fromarray(p), prompt=r["prompt"], seed=str(r["seed"]), model=model)
            for p, r in zip(pictures, rows, strict=True)
        ]  # fmt: skip

    return work


@_explained("Encoding", "fewer cluster.samplers where they share a machine, a smaller base.resolution.")
def encoder(storage: str, prompts: bool, model: str) -> Work:
    """Work that encodes rows with a `picture` (PNG) to their posterior's mean and std, rows with a `prompt`, if there are any, to their conditioning.

    `model`, the model's digest, is there for whoever keeps the work: with other weights it is other work.
    """
    import torch
    from safetensors.torch import save

    from raybooth.families.parts import encode_image

    folder = stage_folder(storage, "base-model")
    family = family_of(folder)
    loaded = for_inference(folder, ("vae", *(family.encoders if prompts else ())))
    place = next(loaded.modules["vae"].parameters())

    @torch.inference_mode()
    def one(row: Row) -> bytes:
        if "prompt" in row:
            tensors = {k: v[0] for k, v in family.encode_text(loaded, [row["prompt"]]).items()}
        else:
            # One by one: a picture's latents must not depend on what it is encoded with.
            mean, std = encode_image(loaded, _pixels(row["picture"]).to(place))
            tensors = {"mean": mean[0], "std": std[0]}
        return save({k: v.float().cpu().contiguous() for k, v in tensors.items()})

    return lambda rows: [one(r) for r in rows]


@_explained("Scoring", SMALLER_ENCODERS, too_large=SMALLER_ENCODERS)
def featurizer(storage: str, model: str) -> Work:
    """Work that encodes rows with a `picture` to its features by both encoders, rows with a `prompt` to CLIP's, as safetensors. `model` is as in encoder()."""
    import torch
    from PIL import Image
    from safetensors.torch import save

    from raybooth.encoders import clip, vit

    folder, device = stage_folder(storage, "encoders"), "cuda" if torch.cuda.is_available() else "cpu"
    dino, (pictures, words) = vit(folder / "dino", device), clip(folder / "clip", device)

    def one(row: Row) -> bytes:
        if "prompt" in row:
            features = words([row["prompt"]])
        else:
            with Image.open(io.BytesIO(row["picture"])) as image:
                features = dino([image]) | pictures([image])
            features["patches"] = features["patches"].half()
        return save({k: v[0].cpu().contiguous() for k, v in features.items()})

    return lambda rows: [one(r) for r in rows]


@_explained("Comparing pictures by LPIPS", f"fewer evaluate.class_images, {SMALLER_ENCODERS}")
def comparer(storage: str, model: str) -> Work:
    """Work that turns rows with several `pictures` into their LPIPS distances from one another, as safetensors. `model` is as in encoder()."""
    import torch
    from PIL import Image
    from safetensors.torch import save

    from raybooth.lpips import lpips

    distances = lpips(stage_folder(storage, "encoders") / "lpips" / "model.safetensors", "cuda" if torch.cuda.is_available() else "cpu")
    return lambda rows: [save({"distances": distances([Image.open(io.BytesIO(p)) for p in row["pictures"]]).cpu()}) for row in rows]


def _pixels(data: bytes) -> "Tensor":
    """The picture in `data` as (1, 3, h, w) in [-1, 1]."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1


def prompt_name(prompt: str) -> str:
    """The file name of a prompt's conditioning among the latents."""
    return f"text-{digest(prompt)[:16]}.safetensors"
