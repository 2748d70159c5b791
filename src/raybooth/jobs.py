"""What runs inside workers: plain callables that know nothing of Ray. Each reads the storage and returns bytes or facts.

torch is imported where it is used: Ray unpickles these functions in its driver and its controllers too, which never call them.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.config import Finetune, Sampling
from raybooth.families import Loaded, family_of
from raybooth.photos import png
from raybooth.workspace import Workspace, digest, explained_if_full

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raybooth.train import TrainingSet

Row = dict[str, Any]


def _model_folder(storage: str, stage: str) -> Path:
    workspace = Workspace(storage)
    workspace.pull(stage)  # where the storage is remote: once a machine
    return workspace.root / stage


def _loaded(folder: Path, parts: tuple[str, ...]) -> Loaded:
    """For inference: half precision on a GPU, where it halves the time; float32 on a CPU, where it does not."""
    import torch

    on_gpu = torch.cuda.is_available()
    return family_of(folder).load(folder, parts, torch.float16 if on_gpu else torch.float32).to("cuda" if on_gpu else "cpu")


def sampler(storage: str, model_stage: str, sampling: Sampling, batch: int, model_digest: str) -> Callable[[list[Row]], list[bytes]]:
    """Draws rows of (prompt, seed) as PNG files that say what they are."""
    from PIL import Image

    from raybooth.sample import PARTS, Sampler

    folder = _model_folder(storage, model_stage)
    family = family_of(folder)
    draw = Sampler(family, _loaded(folder, PARTS), family.facts(folder), sampling, batch).draw

    def work(rows: list[Row]) -> list[bytes]:
        pictures = draw([r["prompt"] for r in rows], [r["seed"] for r in rows])
        return [
            png(Image.fromarray(p), prompt=r["prompt"], seed=str(r["seed"]), model=model_digest)
            for p, r in zip(pictures, rows, strict=True)
        ]  # fmt: skip

    return work


def encoder(storage: str) -> Callable[[list[Row]], list[bytes]]:
    """Encodes rows with a `picture` (PNG) to their posterior's mean and std, rows with a `prompt` to their conditioning."""
    import torch
    from safetensors.torch import save

    folder = _model_folder(storage, "base-model")
    family = family_of(folder)
    loaded = _loaded(folder, ("vae", "text_encoder"))
    place = next(loaded.modules["vae"].parameters())

    @torch.inference_mode()
    def one(row: Row) -> bytes:
        if "prompt" in row:
            tensors = {"conditioning": family.encode_text(loaded, [row["prompt"]])[0]}
        else:
            # One by one: a picture's latents must not depend on what it is encoded with.
            mean, std = family.encode_image(loaded, _pixels(row["picture"]).to(place))
            tensors = {"mean": mean[0], "std": std[0]}
        return save({k: v.float().cpu().contiguous() for k, v in tensors.items()})

    return lambda rows: [one(r) for r in rows]


def _pixels(data: bytes) -> "Tensor":
    """(1, 3, h, w) in [-1, 1]."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1


def finetuner(
    storage: str, target: str, rows: dict[str, list[str]], prompts: dict[str, str], prior_weight: float, finetune: Finetune, seed: int
) -> Callable[..., dict[str, Any]]:
    """The loop of one worker of the group; the first one saves the pipeline in the storage's folder `target`.

    Args:
        rows: names of the latents in the storage, under "instance" and "class".
        prompts: text under "instance" and "class".
    """
    from raybooth.train import Parallel, Settings, fit

    def loop(group: Any, say: Callable[[Row], None]) -> dict[str, Any]:
        folder = _model_folder(storage, "base-model")
        family = family_of(folder)
        parts = tuple(family.trainable(finetune.text_encoder))
        loaded = family.load(folder, parts).to(group.device)
        data = training_set(_model_folder(storage, "latents"), rows, prompts, prior_weight, finetune.text_encoder).to(group.device)
        settings = Settings(
            finetune.steps, finetune.batch, finetune.lr, finetune.weight_decay, finetune.max_grad_norm,
            finetune.text_encoder, finetune.log_every, seed, autocast_dtype(finetune.precision, group.device),
        )  # fmt: skip
        history: list[Row] = []
        began, now, first, last = 0.0, 0.0, 0, 0
        for step in fit(family, loaded, family.diffusion(folder), data, settings, Parallel(group.rank, group.world, group.wrap, group.total)):
            if step.metrics:
                now = time.monotonic()
                began, first, last = (began if history else now), (first if history else step.number), step.number
                history.append({"step": step.number, **vars(step.metrics)})
                say(history[-1])
        if group.rank == 0:
            workspace = Workspace(storage)
            with explained_if_full(storage):
                family.save(folder, loaded.modules, workspace.root / target)
            workspace.push_tree(target)
        # After the first reading: what comes before it is warming up.
        rate = (last - first) / (now - began) if now > began else None
        return {"history": history, "steps_per_second": rate}

    return loop


def training_set(folder: Path, rows: dict[str, list[str]], prompts: dict[str, str], prior_weight: float, text_encoder: bool) -> "TrainingSet":
    """The encoded rows of a storage's latents, instances first."""
    import torch
    from safetensors.torch import load

    from raybooth.train import TrainingSet

    names = rows["instance"] + rows["class"]
    latents = [load((folder / n).read_bytes()) for n in names]
    of_class = torch.arange(len(names)) >= len(rows["instance"])
    kinds = ["instance", "class"] if rows["class"] else ["instance"]
    conditioning = None
    if not text_encoder:
        conditioning = torch.stack([load((folder / prompt_name(prompts[k])).read_bytes())["conditioning"] for k in kinds])
    return TrainingSet(
        mean=torch.stack([x["mean"] for x in latents]),
        std=torch.stack([x["std"] for x in latents]),
        prompt=of_class.long(),
        weight=torch.where(of_class, prior_weight, 1.0),
        prompts=[prompts[k] for k in kinds],
        instances=len(rows["instance"]),
        conditioning=conditioning,
    )


def prompt_name(prompt: str) -> str:
    """Where a prompt's conditioning lies among the latents."""
    return f"prompt-{digest(prompt)[:16]}.safetensors"


def autocast_dtype(precision: str, where: "torch.device") -> "torch.dtype | None":
    """What the forward pass is cast to over float32 weights; None for plain float32."""
    import torch

    if precision == "auto":
        if where.type != "cuda":
            return None  # without AMX or AVX512-BF16, bfloat16 is ten times slower on a CPU (measured)
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
