"""The model card that goes with an export: what it is, from what, by which licence, how it scored, how it is used."""

from pathlib import Path
from typing import Any

from raybooth import evaluation
from raybooth.base_model import local_source
from raybooth.drawing import output_prompts
from raybooth.families import family_of
from raybooth.session import Run
from raybooth.workspace import read_manifest

FILE = "README.md"


def files(run: Run, to: str, name: str, said: list[str], repo: str | None = None) -> dict[str, bytes]:
    """The card and up to three pictures, by their names beside the model.

    Args:
        to: the form of the model; `name`: of its file; `repo`: where it will lie, if not in this folder.
        said: what there is to know about how it was made.
    """
    pictures = {f"picture-{i}.png": path for i, path in enumerate(_pictures(run))}
    text = f"---\n{_header(run, to, list(pictures))}\n---\n\n{_text(run, to, name, said, list(pictures), repo)}"
    return {FILE: text.encode()} | {k: path.read_bytes() for k, path in pictures.items()}


def _pictures(run: Run) -> list[Path]:
    """The first of each of three prompts, if they are of this very model."""
    drawn = read_manifest(run.workspace.root / "output-images")
    if drawn is None or drawn["inputs"].get("model") != run.model_digest("fine-tuned-model"):
        return []
    each = run.config.generate.images_per_prompt
    return [run.workspace.root / "output-images" / n for n in drawn["facts"]["pictures"][::each][:3]]


def _header(run: Run, to: str, pictures: list[str]) -> str:
    """The YAML that the hub reads."""
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
        values["widget"] = [{"text": p, "output": {"url": n}} for p, n in zip(output_prompts(run), pictures, strict=False)]
    return ModelCardData(**values).to_yaml()


def _text(run: Run, to: str, name: str, said: list[str], pictures: list[str], repo: str | None) -> str:
    config, subject = run.config, run.config.subject
    base = _base_name(run)
    kind = {"lora": "LoRA", "kohya": "LoRA in kohya's layout, for ComfyUI, AUTOMATIC1111 and Forge", "single-file": "checkpoint in one file"}.get(to, "model")
    prompts = output_prompts(run)[: len(pictures) or 3]
    facts = {
        "Base": base,
        "Licence of the base": run.facts("base-model").get("license") or "see the base",
        "Token": f"`{subject.token}`",
        "Class": f"`{subject.class_name}`",
        "Trained with the prompt": f"`{subject.prompt}`" + (f", and `{config.class_prompt}` for the class" if config.prior.method != "none" else ""),
        "Digest of the run": f"`{run.workspace.manifest('fine-tuned-model')['digest']}`",
    }
    blocks = [
        f"# {subject.name}",
        f"A DreamBooth {kind}, made with raybooth: write `{subject.name}` for the subject.",
        "\n".join(f"- **{k}**: {v}" for k, v in facts.items()),
        *(["Drawn by the fine-tuned model:"] if pictures else ["Prompts to try:"]),
        "\n".join(f"- `{p}`" + (f"\n\n  ![{p}]({pictures[i]})" if pictures else "") for i, p in enumerate(prompts)),
        *_scores(run),
        *(["## How it was extracted", "\n".join(f"- {line}" for line in said)] if said else []),
        "## Use",
        f"```python\n{_snippet(run, to, name, base, prompts[0], repo)}\n```",
    ]
    return "\n\n".join(blocks) + "\n"


def _base_name(run: Run) -> str:
    """A folder's place on somebody's machine is nobody's business."""
    model, facts = run.config.base.model, run.facts("base-model")
    if local_source(model) is not None:
        return model if model == "mini" else Path(model).name
    return f"{model} at {facts['commit']}" if "commit" in facts else model


def _scores(run: Run) -> list[str]:
    """If they are of the pictures as they are."""
    scores, drawn = (read_manifest(run.workspace.root / stage) for stage in ("scores", "output-images"))
    if scores is None or drawn is None or not set(scores["inputs"]["pictures"]["output"]) <= {o["sha256"] for o in drawn["outputs"].values()}:
        return []
    return ["## Scores of the fine-tuned model", f"```\n{evaluation.table(run)}\n```"]


def _snippet(run: Run, to: str, name: str, base: str, prompt: str, repo: str | None) -> str:
    pipeline = family_of(run.base_folder).pipeline
    here, of = repo or ".", run.config.base.model if local_source(run.config.base.model) is None else f"path/to/{base}"
    file = f"{name}.safetensors" if to == "kohya" else "pytorch_lora_weights.safetensors"
    load = {
        "diffusers": [f'pipe = {pipeline}.from_pretrained("{here}")'],
        "single-file": [f'pipe = {pipeline}.from_single_file("{name}.safetensors", config="{of}")'],
    }
    adapters = [f'pipe = {pipeline}.from_pretrained("{of}")', f'pipe.load_lora_weights("{here}", weight_name="{file}")']
    return "\n".join([f"from diffusers import {pipeline}", "", *load.get(to, adapters), f'pipe("{prompt}").images[0].save("picture.png")'])
