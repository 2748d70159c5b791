"""A LoRA made elsewhere as the fine-tuned model of a storage, which then draws with it."""

from pathlib import Path

from raybooth.base_model import prepare_base
from raybooth.disk import path_of
from raybooth.errors import RayboothError
from raybooth.families import family_of
from raybooth.files import file_digest, files_under
from raybooth.naming import settle_token
from raybooth.session import Run


def import_lora(run: Run, lora: str | Path) -> Path:
    """Fetch the base model and take over `lora` for it, a file in any layout that diffusers reads. Returns the model's folder; `generate` can then draw.

    Raises:
        RayboothError: if the file is not a plain LoRA or does not fit the base, or the storage holds a model of its own.
    """
    from raybooth.families.foreign import plain_rank, read, write
    from raybooth.families.lowrank import hollow

    if "://" in str(lora):
        raise RayboothError(f"{lora} is an address: download it first, and give the file.")
    file = path_of(str(lora), "the LoRA")
    plain_rank(file)  # refuses what is not a LoRA before a base model is fetched
    run.refuse_others_files()
    held = run.manifest_of("fine-tuned-model")
    if held and "imported" not in held["inputs"]:
        raise RayboothError(f"The storage {run.config.storage} holds a model that was fine-tuned there: give another --storage.")
    prepare_base(run)
    settle_token(run)
    stage = run.workspace.stage("fine-tuned-model", {"imported": file_digest(file), "model": run.model_digest("base-model")})
    if stage.done():
        run.save_config()
        run.say("fine-tuned-model: up to date")
        return stage.folder
    stage.clear()
    family = family_of(run.base_folder)
    low = read(family, hollow(family, run.base_folder), file)
    write(family, low, stage.partial)
    layers = {part: len(pairs) for part, pairs in low.parts.items()}
    stage.finish({"imported": file.name, "rank": low.rank, "layers": layers, "history": []}, only=files_under(stage.partial))
    run.save_config()
    run.say(f"fine-tuned-model: a LoRA of rank {low.rank} on {' and '.join(f'{n} layers of {part}' for part, n in layers.items())}, from {file.name}")
    return stage.folder
