"""One HTML file of a run, that opens anywhere: pictures before and after, scores in words, losses, times, configuration."""

import base64
import importlib.metadata
import io
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from raybooth import evaluation, plots, selection
from raybooth.drawing import output_prompts
from raybooth.errors import RayboothError
from raybooth.naming import settle_token
from raybooth.score import Score
from raybooth.session import Run
from raybooth.stages import STAGES
from raybooth.workspace import read_manifest, write_atomically

FILE = "report.html"
SIDE, PER_PROMPT, OF_CLASS = 192, 4, 8
MADE = ("base-model", "instance-images", "class-images", "latents", "fine-tuned-model", "output-images", "before-images", "class-after-images", "features")
VERSIONS = ("raybooth", "torch", "diffusers", "transformers", "ray")
WORDS = {
    "dino": ("Is it the subject?", "DINO: how alike the pictures and the photographs are to an encoder that tells individuals apart."),
    "clip_i": ("Does it look like the photographs?", "CLIP-I: the same by an encoder of what is to be seen at all, places and style included."),
    "clip_t": ("Does it do what the prompt says?", "CLIP-T: how well the pictures fit their prompts, with the class in the token's place."),
    "pres": (
        "Is 'a {class}' still any {class}?",
        "PRES: how much pictures of the class look like the subject. As much as the base model's is good, more is bad.",
    ),
    "div": ("Do pictures of one prompt differ?", "DIV: the mean distance of pictures of the same prompt. One subject differs less than many do."),
    "class_div": ("Is there still more than one {class}?", "DIV of the class: as much as the base model's is good, less means that it has narrowed."),
}


@dataclass(frozen=True)
class Line:
    """A score for people: a question, its answer's numbers, and what they stand between."""

    question: str
    meaning: str
    score: Score

    @property
    def span(self) -> tuple[float, float]:
        """Of the bar: all its numbers lie inside."""
        marks = [x for x in (self.score.low, self.score.high, self.score.floor, self.score.ceiling) if x is not None]
        margin = 0.08 * (max(marks) - min(marks)) or 0.1
        return min(marks) - margin, max(marks) + margin

    def place(self, value: float) -> float:
        """On the bar, in percent."""
        low, high = self.span
        return 100 * (value - low) / (high - low)


def report(run: Run) -> Path:
    """Evaluate a run, as far as it is not done, and write `report.html` from its manifests and pictures.

    Raises:
        RayboothError: if the packages that draw are not installed, or the run is not complete.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RayboothError(f"The report needs {error.name}: pip install 'raybooth[report]'.") from None
    evaluation.evaluate(run)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("raybooth"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template("report.html.j2").render(**_facts(run))
    path = run.workspace.root / FILE
    write_atomically(path, html.encode())
    run.workspace.push(FILE)
    run.say(f"report: {path}")
    return path


def _facts(run: Run) -> dict[str, Any]:
    config, scores = run.config, evaluation.read(run)
    shown = evaluation.pictures(run)
    images = {kind: [run.workspace.root / stage / n for n in names] for kind, (stage, names) in shown.items()}
    each, prompts = config.generate.images_per_prompt, output_prompts(run)
    manifests = {stage: m for stage in MADE if (m := read_manifest(run.workspace.root / stage))}
    trained = manifests["fine-tuned-model"]["facts"]
    return {
        "subject": config.subject,
        "base": manifests["base-model"]["facts"].get("source", config.base.model),
        "photographs": [_uri(p) for p in images["instance"]],
        "prompts": [
            (prompt, *([_uri(p) for p in images[kind][i * each : i * each + min(each, PER_PROMPT)]] for kind in ("before", "output")))
            for i, prompt in enumerate(prompts)
        ],
        "classes": [[_uri(p) for p in images[f"class-{when}"][:OF_CLASS]] for when in ("before", "after")],
        "class_prompt": config.class_prompt,
        "scores": [Line(q.replace("{class}", config.subject.class_name), m, scores[k]) for k, (q, m) in WORDS.items() if k in scores],
        "strip": _strip(run, trained.get("selected")),
        "losses": plots.losses(trained["history"]),
        "times": plots.bars({stage: m["seconds"] for stage, m in manifests.items() if "seconds" in m}),
        "where": trained.get("where", "an earlier version"),
        "configuration": json.dumps(config.model_dump(by_alias=True, mode="json"), indent=2, ensure_ascii=False),
        "versions": [(name, version(name)) for name in VERSIONS],
        "digests": [(stage, m["digest"]) for stage, m in manifests.items()],
        "command": f"raybooth run {shlex.quote(str(run.workspace.root / 'config.json'))} --storage ANOTHER-FOLDER",
    }


def _strip(run: Run, selected: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the checkpoints drew: a column each, the base model's first, and a line a prompt."""
    if not selected:
        return None
    steps = [0, *(c["step"] for c in selected["candidates"])]
    files = {r["prompt"]: r["name"] for r in reversed(selection.rows_of(run))}  # the first picture of each prompt
    lines = [(prompt, [_uri(run.workspace.root / selection.FOLDER / f"{step:07d}" / name) for step in steps]) for prompt, name in reversed(files.items())]
    return {"steps": steps, "taken": selected["step"], "rule": selected["rule"], "lines": lines, "scores": selected["candidates"]}


def version(name: str) -> str:
    """Of an installed package, for people."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _uri(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    if max(small.size) > SIDE:
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


ALL = {**STAGES, "evaluate": evaluation.evaluate, "report": report}
"""Every verb that is a function of a run."""


def do(run: Run, names: Iterable[str]) -> None:
    """Those verbs, in order."""
    for name in names:
        if name != "prepare":
            settle_token(run)
        ALL[name](run)
