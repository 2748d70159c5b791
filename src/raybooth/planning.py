"""What a run will need, from its configuration and the model folder's configuration files alone: no weights, no GPU.

The step is run on tensors without data (torch's FakeTensorMode) under torch's memory tracker.
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from raybooth.base_model import check_fits
from raybooth.config import Config
from raybooth.errors import RayboothError
from raybooth.families import Family, Loaded, family_of
from raybooth.families.folder import names_in, needed_files, read_object
from raybooth.families.parts import decode, unloaded
from raybooth.flops import loss_without_data, passes_of_step, picture_flops, step_flops, without_weights
from raybooth.method import autocast_dtype, drawing_dtype
from raybooth.optim import Average, Outline, make_optimizer
from raybooth.sample import decoded_at_once
from raybooth.sections import Finetune
from raybooth.teacher import Teacher

GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What a run needs: bytes at the peak of a step of one worker, by part; FLOPs of a step of all workers, and of all pictures together; counts.

    Attributes:
        drawing: bytes at the peak of drawing a batch, by part: all of the model is there, text encoders and VAE too.
        stored: bytes in the storage when it holds most, without the photographs and the encoders of the scores.
    """

    parameters: Mapping[str, int]
    trained: int
    memory: Mapping[str, int]
    drawing: Mapping[str, int]
    step_flops: int
    steps: int
    class_pictures: int
    pictures: int
    drawing_flops: int
    stored: int

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def drawing_peak(self) -> int:
        return sum(self.drawing.values())

    def __str__(self) -> str:
        lines = [f"{name:<22}{count / 1e6:>12,.1f} M parameters" for name, count in self.parameters.items()]
        lines += [f"{'trained':<22}{self.trained / 1e6:>12,.1f} M parameters", ""]
        lines += [f"{name:<22}{size / GIB:>12.2f} GiB" for name, size in self.memory.items()]
        lines += [f"{'peak of a worker':<22}{self.peak / GIB:>12.2f} GiB"]
        lines += [f"{'peak of drawing':<22}{self.drawing_peak / GIB:>12.2f} GiB ({self.drawing['weights'] / GIB:.2f} of them weights)", ""]
        lines += [
            f"{'steps':<22}{self.steps:>12,} of {_flop(self.step_flops)}, {_flop(self.steps * self.step_flops)} in all",
            f"{'pictures to draw':<22}{self.class_pictures + self.pictures:>12,} ({self.class_pictures} of the class), {_flop(self.drawing_flops)} in all",
            f"{'to be stored':<22}{self.stored / GIB:>12.2f} GiB",
        ]
        return "\n".join(lines)


def _flop(n: int) -> str:
    return f"{n / 1e15:.2f} PFLOP" if n >= 1e14 else f"{n / 1e12:.2f} TFLOP"


def plan(folder: Path, config: Config, device: str = "cuda") -> Plan:
    """The plan of `config` on the model in `folder`. `device` decides what precision "auto" means.

    Raises:
        RayboothError: if the model cannot do what the configuration asks of it.
    """
    check_fits(config, folder)
    family = family_of(folder)
    finetune, trained = config.finetune, family.trainable(config.finetune.text_encoder)
    with torch.device("meta"):
        loaded = unloaded(family, folder, (family.denoiser, "vae", *family.encoders))
        parameters = {part: count(module) for part, module in loaded.modules.items()}
        side = config.base.resolution or loaded.facts.resolution
        drawing_flops = _drawing_flops(family, loaded, config, side)
    used = without_weights(family, folder, finetune, config.lora, device)
    workers = config.workers[0]
    flops = step_flops(family, used, config.prior, finetune, side, workers)
    saved = {part: sum(t.numel() * (4 if part in family.encoders else t.element_size()) for t in _saved(used.modules[part])) for part in trained}
    held = [*used.modules.values(), *_copy_that_teaches(family, used, config, trained, device)]
    with FakeTensorMode():
        for module in held:
            _without_data(module)
        memory, checkpoint = _step(family, used, held, config, trained, side, device)
    drawing = _drawing(family, folder, config, side, device)
    moving = sum(p.numel() for part in trained for p in used.modules[part].parameters() if p.requires_grad)
    latent = 2 * 4 * math.prod(loaded.facts.latent_shape(side))
    memory["latents"] = config.prior.drawn * latent  # on the device, all of them; photographs are few
    drawn, pictures = config.prior.drawn, _results(config)
    base = {part: _weights(folder, part, loaded.modules[part]) for part in family.weights}
    result = 4 * moving if finetune.method == "lora" else sum(saved[part] if part in trained else size for part, size in base.items())
    picture = side * side * 3  # a PNG of a photograph is about as large as its pixels
    written = (finetune.steps - 1) // finetune.checkpoint_every + (config.evaluate.select != "last")
    # A checkpoint is written before the oldest goes; when the result is written, that is over.
    most = max(min(written, finetune.checkpoints + 1) * checkpoint, min(written, finetune.checkpoints) * checkpoint + result + pictures * picture)
    stored = sum(base.values()) + drawn * (picture + latent) + most
    return Plan(parameters, moving, memory, drawing, flops, finetune.steps, drawn, pictures, drawing_flops, stored)


def _drawing_flops(family: Family, loaded: Loaded, config: Config, side: int) -> int:
    """FLOPs of drawing the class pictures and the result's, without the encoding of their prompts."""
    flops, batch, shape = 0, config.cluster.sample_batch, loaded.facts.latent_shape(side)
    for n, section in ((config.prior.drawn, config.prior), (_results(config), config.generate)):
        if n:
            how = family.sampling(section, side)
            step, decoding = picture_flops(family, loaded, side, how.guidance > 1)
            with torch.device("cpu"):
                passes = len(family.scheduler(loaded.folder, how.scheduler, how.steps, shape, torch.device("cpu")).timesteps)  # pndm makes one more
            flops += math.ceil(n / batch) * batch * (passes * step + decoding)  # the last batch is filled up
    return flops


def _results(config: Config) -> int:
    """The number of pictures of the result: prompts that are the same once filled in count once."""
    return len(config.output_prompts) * config.generate.images_per_prompt


def _weights(folder: Path, part: str, module: nn.Module) -> int:
    """Bytes of a part's weights as they are copied, by their files or a list of these; if neither is there to tell, as float32."""
    try:
        names = needed_files(names_in(folder), [part], (), str(folder))
    except RayboothError:  # a plan can do without
        names = []
    found = sum((folder / name).stat().st_size for name in names if name.endswith(".safetensors"))
    metadata = [read_object(folder / name).get("metadata") for name in names if ".safetensors.index." in name]
    listed = [m["total_size"] for m in metadata if isinstance(m, dict) and isinstance(m.get("total_size"), int)]
    return max(found, *listed, 0) or 4 * sum(t.numel() for t in _saved(module))


def _saved(module: nn.Module) -> Iterable[Tensor]:
    """The tensors that a file of the module holds, each once."""
    return {id(t): t for t in module.state_dict(keep_vars=True).values()}.values()


def _without_data(module: nn.Module) -> None:
    """Turn the module's meta tensors into tensors of the CPU without data; to be called under a FakeTensorMode."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # two modules share T5's word embeddings
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                if p not in made:
                    made[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                part._parameters[name] = made[p]
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class _Tracker(MemTracker):
    """Keeps only the peak of the whole: torch's own looks at every module at every operation for their peaks, which takes minutes for a large model."""

    def __init__(self, held: Iterable[nn.Module]) -> None:
        super().__init__()
        for frozen in (p for module in held for p in module.parameters() if not p.requires_grad):
            # It would put hooks on their gradients, of which they have none: these handles tell it that the hooks are set.
            self._param_to_grad_hook_handles[frozen] = (RemovableHandle(OrderedDict()), RemovableHandle(OrderedDict()))

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)


def _copy_that_teaches(family: Family, loaded: Loaded, config: Config, trained: tuple[str, ...], device: str) -> list[nn.Module]:
    if not config.prior.teacher:
        return []
    modules = nn.ModuleDict({part: loaded.modules[part] for part in trained})
    copy = Teacher(family, loaded, modules, autocast_dtype(family, config.finetune.precision, device)).copy
    return [copy] if copy else []


def _step(
    family: Family, loaded: Loaded, held: list[nn.Module], config: Config, trained: tuple[str, ...], side: int, device: str
) -> tuple[dict[str, int], int]:  # fmt: skip
    """Memory at the peak, by part, of the second step of one worker, when the optimizer has its state; and the bytes of a checkpoint.
    `held` are the modules that the worker has.
    """
    finetune, tracker, workers = config.finetune, _Tracker(held), config.workers[0]
    passes = passes_of_step(config.prior, finetune, workers)[0]  # of the first worker: no other has more rows
    parameters = {f"{part}.{k}": p for part in trained for k, p in loaded.modules[part].named_parameters() if p.requires_grad}
    optimizer = _optimizer(finetune, list(parameters.values()))
    average = Average(parameters, finetune.ema) if finetune.ema else None
    averages = list(average.values.values()) if average else []
    buckets = _Buckets(parameters.values() if workers > 1 else ())
    tracker.track_external(*held, optimizer, *averages, *buckets.held.values())
    dtype = autocast_dtype(family, finetune.precision, device)
    norms = _norms_in_float32() if dtype and device == "cuda" else contextlib.nullcontext()
    with tracker, norms:
        for step in range(2):
            for i, (rows, _) in enumerate(passes, 1):
                tracker.reset_mod_stats()
                buckets.open = i == len(passes)
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = loss_without_data(family, loaded, trained, rows, side)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update(step + 1)
    kept = [*parameters.values(), *averages, *(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))]
    return _by_part(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]), sum(t.numel() * t.element_size() for t in kept)


def _drawing(family: Family, folder: Path, config: Config, side: int, device: str) -> dict[str, int]:
    """Memory at the peak of a batch's pictures, by part: of a step of the denoiser, or of the decoding of one large picture, or of all small ones."""
    with torch.device("meta"):
        loaded = unloaded(family, folder, (family.denoiser, "vae", *family.encoders), drawing_dtype(family, device, bfloat16=True))
        loaded.modules["vae"].float()
    batch, shape = config.cluster.sample_batch, loaded.facts.latent_shape(side)
    guided = any(family.sampling(how, side).guidance > 1 for how in (config.prior, config.generate))
    rows = batch * (2 if guided and not loaded.facts.embeds_guidance else 1)
    dtype = next(loaded.modules[family.denoiser].parameters()).dtype
    with FakeTensorMode(), torch.no_grad():
        for module in loaded.modules.values():
            _without_data(module)
        text = {k: torch.zeros(rows, *s, dtype=dtype) for k, s in family.conditioning(folder).items()}
        tracker = _Tracker(loaded.modules.values())
        tracker.track_external(*loaded.modules.values(), *text.values())
        with tracker:
            family.predict(loaded, torch.zeros(rows, *shape, dtype=dtype), torch.zeros(rows), text)
            decode(loaded, torch.zeros(decoded_at_once(batch, side), *shape, dtype=dtype))
    return _by_part(tracker.get_tracker_snapshot("peak")[torch.device("cpu")])


@contextlib.contextmanager
def _norms_in_float32() -> Iterator[None]:
    """Compute norms as CUDA's autocast does, in float32, which is also kept for the backward pass; a CPU's autocast leaves them in half precision."""

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def computed(*args: Any, **kwargs: Any) -> Tensor:
            cast = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return norm(*cast[0], **cast[1])

        return computed

    with contextlib.ExitStack() as kept:
        for name in ("group_norm", "layer_norm", "rms_norm"):
            kept.callback(setattr, nn.functional, name, getattr(nn.functional, name))
            setattr(nn.functional, name, in_float32(getattr(nn.functional, name)))
        yield


class _Buckets:
    """The gradients that DistributedDataParallel holds, between the steps too. In a step's last pass, while it is `open`, gradients move in."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.held, self.open = {p: torch.empty_like(p) for p in parameters}, False
        for p in self.held:
            p.register_post_accumulate_grad_hook(self._take)

    def _take(self, p: Tensor) -> None:
        if self.open and p.grad is not None:
            p.grad = self.held[cast(nn.Parameter, p)].copy_(p.grad)


def _optimizer(finetune: Finetune, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the configuration: AdamW itself, or an Outline of what another holds."""
    groups: list[dict[str, Any]] = [{"params": parameters, "lr": finetune.lr}]
    return make_optimizer("adamw", groups, finetune.weight_decay, 0) if finetune.optimizer == "adamw" else Outline(finetune.optimizer, groups)


def _by_part(snapshot: Mapping[Any, int]) -> dict[str, int]:
    """A snapshot of the tracker in the words of a plan."""
    names = {
        "Parameter": "weights", "Buffer": "weights", "Gradient": "gradients", "Optstate": "optimizer", "Other": "average", "Activation": "activations",
    }  # fmt: skip
    memory = dict.fromkeys(("weights", "gradients", "optimizer", "average", "activations", "temporary"), 0)
    for kind, size in snapshot.items():
        name = str(getattr(kind, "value", kind))
        if name != "Total":
            memory[names.get(name, "temporary")] += size
    return memory
