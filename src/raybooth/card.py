"""The model card that goes with an export: what the model is, what it was made from, its licence, its scores, how to use it."""

import json
from pathlib import Path
from typing import Any

from raybooth import evaluation
from raybooth.base_model import local_source
from raybooth.drawing import by_prompt
from raybooth.families import family_of
from raybooth.families.lora import WEIGHTS
from raybooth.families.single import SUFFIX
from raybooth.jobs import drawing_digest
from raybooth.session import Run

FILE = "README.md"
KINDS = {
    "diffusers": "DreamBooth model",
    "lora": "DreamBooth LoRA",
    "kohya": "DreamBooth LoRA in kohya's layout, for ComfyUI, AUTOMATIC1111 and Forge",
    "single-file": "DreamBooth checkpoint in one file",
}


def files(run: Run, to: str, name: str, said: list[str], repo: str | None = None) -> dict[str, bytes]:
    """The card and up to three pictures, by the file names they get beside the model.

    Args:
        to, name: the form of the model, and the name of its file.
        said: notes on how it was made.
        repo: the repository that it goes to, if it does not stay in a folder.
    """
    shown = _pictures(run)
    pictures = {f"picture-{i}.png": prompt for i, prompt in enumerate(shown)}
    text = f"---\n{_header(run, to, pictures)}\n---\n\n{_text(run, to, name, said, pictures, repo)}"
    return {FILE: text.encode()} | {k: shown[prompt].read_bytes() for k, prompt in pictures.items()}


def _drawn(run: Run) -> dict[str, Any] | None:
    """The manifest of the output pictures, if this very model drew them."""
    drawn = run.manifest_of("output-images")
    return drawn if drawn and drawn["inputs"].get("model") == drawing_digest(run.workspace, "fine-tuned-model") else None


def _pictures(run: Run) -> dict[str, Path]:
    """Up to three prompts, with the path of the first picture of each."""
    first = {prompt: names[0] for prompt, names in by_prompt(run, "output-images").items()} if _drawn(run) else {}
    return {prompt: run.workspace.root / "output-images" / name for prompt, name in list(first.items())[:3]}


def _header(run: Run, to: str, pictures: dict[str, str]) -> str:
    """The card's YAML header, which the hub reads."""
    from huggingface_hub import ModelCardData

    config, licence = run.config, run.facts("base-model").get("license")
    lora = to in ("lora", "kohya")
    values: dict[str, Any] = {
        "license": licence,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": config.subject.prompt,
        "tags": ["text-to-image", "diffusers", "dreambooth", *(["lora"] if lora else []), "raybooth"],
    }
    if local_source(config.base.model) is None:
        values |= {"base_model": config.base.model, "base_model_relation": "adapter" if lora else "finetune"}
    if pictures:
        values["widget"] = [{"text": prompt, "output": {"url": name}} for name, prompt in pictures.items()]
    return ModelCardData(**values).to_yaml()


def _text(run: Run, to: str, name: str, said: list[str], pictures: dict[str, str], repo: str | None) -> str:
    subject, prompts = run.config.subject, list(pictures.values()) or run.config.output_prompts[:3]
    blocks = [
        f"# `{subject.name}`",
        f"A {KINDS[to]}: write `{subject.name}` for the subject. Made with raybooth.",
        "\n".join(f"- **{k}**: {v}" for k, v in _facts(run).items()),
        "Drawn by the fine-tuned model:" if pictures else "Prompts to try:",
        "\n".join([f"- `{p}`\n\n  ![{p}]({name})" for name, p in pictures.items()] or [f"- `{p}`" for p in prompts]),
        *_scores(run),
        *(["## What the LoRA keeps of the fine-tuned model", "\n".join(f"- {line}" for line in said)] if said else []),
        f"## Use\n\n```python\n{_snippet(run, to, name, prompts[0], repo)}\n```",
    ]
    return "\n\n".join(blocks) + "\n"


def _facts(run: Run) -> dict[str, str]:
    config, subject, manifest = run.config, run.config.subject, run.workspace.manifest("fine-tuned-model")
    prompts = f"`{subject.prompt}`" + (f", and `{config.class_prompt}` for the class" if config.prior.preserves else "")
    imported = manifest["facts"].get("imported")
    return {
        "Base": _base_name(run),
        "Licence of the base": run.facts("base-model").get("license") or "see the base",
        "Token": f"`{subject.token}`",
        "Class": f"`{subject.class_name}`",
        **({"Taken over from": f"`{imported}`"} if imported else {"Trained with the prompt": prompts}),
        "Digest of the run": f"`{manifest['digest']}`",
    }


def _base_name(run: Run) -> str:
    """The base model as the card names it; of a local one without its path, which is nobody's business."""
    model, facts = run.config.base.model, run.facts("base-model")
    if local_source(model) is not None:
        return model if model == "mini" else Path(model).name
    return f"{model} at {facts['commit']}" if "commit" in facts else model


def _scores(run: Run) -> list[str]:
    """The card's section on scores; empty unless they are of the pictures as they are now."""
    scores, drawn = run.manifest_of("scores"), _drawn(run)
    if scores is None or drawn is None or scores["inputs"]["pictures"]["output"] != [drawn["outputs"][n]["sha256"] for n in drawn["facts"]["pictures"]]:
        return []
    return ["## Scores of the fine-tuned model", f"```\n{evaluation.table(run)}\n```"]


def _has_half_encoders(folder: Path) -> bool:
    """Whether a text encoder of the pipeline in `folder` is saved in half precision."""
    from safetensors import safe_open

    for file in folder.glob("text_encoder*/*.safetensors"):
        with safe_open(file, "np") as held:
            if any(held.get_slice(name).get_dtype() in ("F16", "BF16") for name in held.keys()):  # noqa: SIM118
                return True
    return False


def _snippet(run: Run, to: str, name: str, prompt: str, repo: str | None) -> str:
    pipeline, base, here = family_of(run.base_folder).pipeline, run.config.base, repo or "."
    local = local_source(base.model)
    place = base.model if local is None else f"path/to/{_base_name(run)}"
    of_file = f', config="path/to/{Path(base.configuration).name}"' if base.configuration else ""  # diffusers knows those of the common models
    in_file = local is not None and local.suffix == SUFFIX
    opened = f'pipe = {pipeline}.from_single_file("{place}"{of_file})' if in_file else f'pipe = {pipeline}.from_pretrained("{place}")'
    config = of_file if in_file else f', config="{place}"'
    # transformers opens text encoders in the precision they are saved in, and diffusers the rest in float32: half of one kind would not go together.
    precision = ", torch_dtype=torch.bfloat16" if to == "diffusers" and _has_half_encoders(run.model_folder) else ""
    lines = {
        "diffusers": [f'pipe = {pipeline}.from_pretrained("{here}"{precision})'],
        "lora": [opened, f'pipe.load_lora_weights("{here}", weight_name="{WEIGHTS}")'],
        "kohya": [opened, f'pipe.load_lora_weights("{here}", weight_name="{name}.safetensors")'],
        "single-file": [f'pipe = {pipeline}.from_single_file("{name}.safetensors"{config})'],
    }[to]
    drawn = f'pipe({json.dumps(prompt, ensure_ascii=False)}).images[0].save("picture.png")'
    return "\n".join([*(["import torch"] if precision else []), f"from diffusers import {pipeline}", "", *lines, drawn])
