"""The fine-tuning job: what one worker of the group does around fit(), with checkpoints and a log.

torch is imported where it is used, as in jobs.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.disk import explained, explained_if_full
from raybooth.errors import LESS_MEMORY
from raybooth.families import Family, family_of
from raybooth.jobs import Row, explained_if_out_of_memory, prompt_name, stage_folder
from raybooth.log import Log
from raybooth.method import autocast_dtype, held_in, make_ready
from raybooth.sections import Finetune, Lora, Prior
from raybooth.workspace import Workspace

if TYPE_CHECKING:
    from raybooth.dataset import TrainingSet


def finetuner(
    storage: str, target: str, key: str, rows: dict[str, list[str]], prompts: dict[str, str],
    prior: Prior, finetune: Finetune, lora: Lora, seed: int, keep_last: bool,
) -> Callable[..., dict[str, Any]]:  # fmt: skip
    """The loop of one worker of the group; the first one writes checkpoints and saves the pipeline in the storage's folder `target`.

    Args:
        key: digest of all that determines the weights; a run does not resume from checkpoints under another.
        keep_last: whether the last step becomes a checkpoint too, to be compared with the others.
        rows: names of the latents in the storage, under "instance" and "class".
        prompts: text under "instance" and "class".
    """
    from raybooth.checkpoint import Checkpoints
    from raybooth.families.parts import load
    from raybooth.flops import step_flops, without_weights
    from raybooth.train import Parallel, Settings, fit

    def loop(group: Any, say: Callable[[Row], None]) -> dict[str, Any]:
        folder = stage_folder(storage, "base-model")
        family = family_of(folder)
        trained, how = family.trainable(finetune.text_encoder), in_common(family, finetune, group)
        with out_of_memory_explained():
            loaded = load(family, folder, trained, held_in(family, how, group.device.type)).to(group.device)
            make_ready(family, loaded, how, lora, seed)
        known = family.has_frozen_encoders(finetune.text_encoder)
        with out_of_memory_explained():
            data = training_set(stage_folder(storage, "latents"), rows, prompts, prior, known).to(group.device)
        workspace = Workspace(storage)
        if group.rank == 0:
            workspace.check_writable()
        recipe = {"finetune": finetune.model_dump(mode="json"), "lora": lora.model_dump(mode="json"), "seed": seed}
        checkpoints = Checkpoints(workspace, key, finetune.checkpoints, recipe)
        start, notes = checkpoints.newest(group.least)
        if group.rank == 0:
            checkpoints.upload_what_is_left()
        begun, readings = (start.step, start.scalars.get("readings", [])) if start else (0, [])
        for note in [*notes, *([f"goes on from the checkpoint of step {begun}"] if begun else [])]:
            say({"note": note})
        say({"start": begun})
        images = finetune.batch * (2 if data.instances < len(data.weight) else 1)
        side = data.mean.shape[-1] * loaded.facts.downscale
        flops = step_flops(family, without_weights(family, folder, finetune, lora), prior, finetune, side, group.world)
        log = Log(workspace, key, finetune.trackers if group.rank == 0 else None, begun, readings, images, flops, say)
        parallel = Parallel(group.rank, group.world, group.wrap, group.total)
        every, steps = finetune.checkpoint_every, finetune.steps
        due = (readings[-1]["step"] // every + 1) * every if readings else 0  # as if it had never stopped
        settings = Settings(how, seed, autocast_dtype(family, how.precision, group.device.type))
        training = fit(family, loaded, data, settings, parallel, start)
        del start  # so that fit() can release it: a checkpoint is as large as what is trained
        with log, explained(storage, workspace.root), explained_if_full(f"The storage {storage}"):
            with out_of_memory_explained():
                for step in training:
                    if step.metrics:
                        row = vars(step.metrics)
                        if group.rank == 0 and (step.number >= due or step.number == steps):
                            row, due = row | step.validate(), (step.number // every + 1) * every
                        say(log.write(step.number, row))
                    if (step.number % every == 0 and step.number < steps) or (keep_last and step.number == steps):
                        state = step.state()
                        if group.rank == 0:
                            checkpoints.save(replace(state, scalars=state.scalars | {"readings": [*log.rows]}))
            if group.rank == 0:
                if workspace.remote:  # the line stands at its end meanwhile
                    say({"note": "all steps are done; what is not in the storage yet is uploaded"})
                checkpoints.wait()
                save_trained(family, folder, {part: loaded.modules[part] for part in trained}, finetune.method, workspace.root / target)
                workspace.push_tree(target)
        return {"history": log.rows, "steps_per_second": log.rate(), "where": group.where}

    return loop


def in_common(family: Family, finetune: Finetune, group: Any) -> Finetune:
    """`finetune` with one precision for the whole group in place of "auto": unlike devices, each with its own, would average gradients of unlike scale."""
    if finetune.precision != "auto":
        return finetune
    own = str(autocast_dtype(family, "auto", group.device.type) or "fp32").removeprefix("torch.")
    names = {"fp32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # each worker can do those before its own
    return finetune.model_copy(update={"precision": [*names.values()][group.least([*names].index(own))]})


def save_trained(family: Family, base: Path, modules: "dict[str, Any]", method: str, target: Path) -> None:
    """Save the trained parts in the form that plain diffusers opens: a pipeline, or adapters."""
    from raybooth.families.lora import save_adapters
    from raybooth.families.parts import save

    if method == "lora":
        save_adapters(family, modules, target)
    else:
        save(base, modules, target)


def exporter(storage: str, checkpoint: str, target: str) -> Callable[[list[Row]], list[bytes]]:
    """Work that saves a checkpoint as the fine-tuned model in the storage's folder `target`, as the training would have, had it ended there."""
    import torch

    from raybooth.families.parts import load
    from raybooth.restore import recipe_of, restore

    def work(rows: list[Row]) -> list[bytes]:
        workspace, folder, base = Workspace(storage), stage_folder(storage, checkpoint), stage_folder(storage, "base-model")
        family, finetune = family_of(base), recipe_of(folder)
        # With adapters nothing of the base is saved, and a large base may not fit in float32.
        dtype = torch.bfloat16 if finetune.method == "lora" or finetune.precision == "bf16-weights" else torch.float32
        loaded = load(family, base, family.trainable(finetune.text_encoder), dtype)
        shutil.rmtree(workspace.root / target, ignore_errors=True)
        with explained_if_full(f"The storage {storage}"):
            save_trained(family, base, restore(family, loaded, folder), finetune.method, workspace.root / target)
        workspace.push_tree(target)
        return [b"" for _ in rows]

    return work


out_of_memory_explained = partial(explained_if_out_of_memory, "Fine-tuning", LESS_MEMORY)


def training_set(folder: Path, rows: dict[str, list[str]], prompts: dict[str, str], prior: Prior, known: bool) -> "TrainingSet":
    """The encoded rows of a storage's latents, instances first, with the prompts' conditioning if it is `known` there.

    Where the base model's predictions alone teach them, class rows have no pictures of their own: they are the instance pictures under the class's prompt.
    """
    import torch
    from safetensors.torch import load

    from raybooth.dataset import TrainingSet

    of = rows["instance"] if prior.method == "base-prediction" else rows["class"]
    names = rows["instance"] + of
    latents = {n: load((folder / n).read_bytes()) for n in set(names)}
    of_class = torch.arange(len(names)) >= len(rows["instance"])
    kinds = ["instance", "class"] if of else ["instance"]
    conditioning = None
    if known:
        texts = [load((folder / prompt_name(prompts[k])).read_bytes()) for k in kinds]
        conditioning = {k: torch.stack([t[k] for t in texts]) for k in texts[0]}
    return TrainingSet(
        mean=torch.stack([latents[n]["mean"] for n in names]),
        std=torch.stack([latents[n]["std"] for n in names]),
        prompt=of_class.int().tolist(),
        weight=torch.where(of_class, prior.weight, 1.0),
        prompts=[prompts[k] for k in kinds],
        instances=len(rows["instance"]),
        conditioning=conditioning,
        teacher=prior.teacher,
    )
