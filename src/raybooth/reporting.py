"""One HTML file of a run, that opens anywhere: pictures before and after, scores in words, losses, times, configuration."""

import base64
import importlib.metadata
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from raybooth import evaluation
from raybooth.errors import RayboothError
from raybooth.score import Score
from raybooth.session import Run
from raybooth.stages import STAGES, output_prompts
from raybooth.workspace import read_manifest, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        "losses": _svg(_losses(manifests["fine-tuned-model"]["facts"]["history"])),
        "times": _svg(_bars({stage: m["seconds"] for stage, m in manifests.items() if "seconds" in m})),
        "where": manifests["fine-tuned-model"]["facts"].get("where", "an earlier version"),
        "configuration": json.dumps(config.model_dump(by_alias=True, mode="json"), indent=2, ensure_ascii=False),
        "versions": [(name, version(name)) for name in VERSIONS],
        "digests": [(stage, m["digest"]) for stage, m in manifests.items()],
        "command": f"raybooth run {shlex.quote(str(run.workspace.root / 'config.json'))} --storage ANOTHER-FOLDER",
    }


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


def _figure(height: float) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _losses(history: list[dict[str, float]]) -> "Figure":
    figure, axes = _figure(2.8)
    for name, colour in (("instance", "#d2691e"), ("prior", "#3a6ea5")):
        axes.plot([r["step"] for r in history], [r[name] for r in history], color=colour, label=name)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    return figure


def _bars(seconds: dict[str, float]) -> "Figure":
    figure, axes = _figure(0.6 + 0.3 * len(seconds))
    names = list(seconds)[::-1]
    axes.bar_label(axes.barh(names, [seconds[n] for n in names], color="#3a6ea5"), fmt="%.0f s", padding=4)
    axes.set_xlabel("seconds")
    return figure


def _svg(figure: "Figure") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


ALL = {**STAGES, "evaluate": evaluation.evaluate, "report": report}
"""Every verb that is a function of a run."""
