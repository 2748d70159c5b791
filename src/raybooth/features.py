"""Features of a run's pictures and prompts: what the encoders in its storage make of both."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raybooth.drawing import model_bytes
from raybooth.score import Array
from raybooth.session import Run

TAKES_ARTICLE = frozenset(["", "of", "with", "and", "or", "to", "by", "near", "beside", "behind", "like", "as", "in", "on", "for", "from"])
"""Words after which a noun wants its article, and the beginning of a prompt or of a part of it."""


def scored_prompt(run: Run, prompt: str) -> str:
    """What CLIP is asked: the token means nothing to it, and is left out. The class stays, or stands where the token stood alone.

    "a unqtkn dog" and "photo of unqtkn dog" become "a dog" and "photo of a dog".
    """
    token, noun = run.config.subject.token, run.config.subject.class_name

    def without_token(found: re.Match[str]) -> str:
        before = re.split(r"\W", prompt[: found.start()].rstrip())[-1]
        return f"a {noun}" if before.lower() in TAKES_ARTICLE else noun

    return re.sub(rf"(?<!\w){re.escape(token)}(?!\w)(?: {re.escape(noun)})?", without_token, prompt)


def features(run: Run, folder: str, pictures: Mapping[str, tuple[str, list[str]]], prompts: Sequence[str]) -> dict[str, dict[str, Array]]:
    """Stacked in the order of the pictures, by kind; those of the prompts under "prompts". Only what is new is computed.

    Args:
        folder: of the storage, for the features.
        pictures: by kind, a stage and names of its files.
        prompts: as CLIP shall read them.
    """
    from raybooth import jobs
    from raybooth.cluster.rows import map_rows

    rows: dict[str, dict[str, Any]] = {}
    order: dict[str, list[str]] = {}
    for kind, (stage_name, names) in pictures.items():
        outputs = run.outputs(stage_name)
        order[kind] = [f"{outputs[name][:32]}.safetensors" for name in names]
        rows |= {n: {"file": run.workspace.root / stage_name / name} for n, name in zip(order[kind], names, strict=True)}
    order["prompts"] = [jobs.prompt_name(p) for p in prompts]
    rows |= {jobs.prompt_name(p): {"prompt": p} for p in prompts}
    stage = run.workspace.stage(folder, {"encoders": run.model_digest("encoders")})
    missing = stage.missing(rows)
    work = [{"name": n, **({"prompt": r["prompt"]} if "prompt" in r else {"picture": r["file"].read_bytes()})} for n, r in rows.items() if n in set(missing)]
    if work:
        done = map_rows(
            partial(jobs.featurizer, run.workspace.uri), work, batch=16, have=run.ray,
            samplers=run.config.cluster.samplers, model_bytes=model_bytes(run, "encoders"),
        )  # fmt: skip
        for name, data in run.progress(done, len(work), folder, "row"):
            stage.write(name, data)
    if work or not stage.done(rows):
        stage.finish(only=rows)
    return {kind: _stacked([stage.folder / n for n in names]) for kind, names in order.items()}


def _stacked(files: list[Path]) -> dict[str, Array]:
    from safetensors.numpy import load_file

    loaded = [load_file(f) for f in files]
    return {k: np.stack([one[k] for one in loaded]).astype(np.float32) for k in loaded[0]} if loaded else {}
