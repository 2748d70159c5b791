"""One HTML file about a run that opens anywhere: pictures before and after, scores in words, losses, times, configuration."""

import base64
import io
import json
import shlex
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from PIL import Image

from raybooth import evaluation, plots, selection
from raybooth.drawing import by_prompt
from raybooth.errors import RayboothError
from raybooth.files import write_atomically
from raybooth.score import Score
from raybooth.sections import Prior
from raybooth.session import Run, settings_of
from raybooth.verdict import verdicts

FILE = "report.html"
PROMPTS, PER_PROMPT, OF_CLASS, PHOTOGRAPHS, COLUMNS = 100, 4, 8, 24, 12
BUDGET = 4_200_000  # characters for all pictures together, of the 5 MB of a page that can be sent
LADDER = [(side, quality) for side in (1024, 768, 512, 384, 288, 216, 160, 120, 88, 64) for quality in (90, 80)]
"""How pictures may be embedded: the longest side in pixels, and JPEG's quality. The largest first, in bytes too."""
SETTINGS = "settings.json"  # by its name on the page
WORDS = {
    "dino": ("Is it the subject?", "DINO: how alike the pictures and the photographs are to an encoder that tells individuals apart. Higher is better."),
    "clip_i": (
        "Does it look like the photographs?",
        "CLIP-I: the same by an encoder of what is to be seen at all, places and style included. Higher is better.",
    ),
    "clip_t": (
        "Does it do what the prompt says?",
        "CLIP-T: how well the pictures fit their prompts, the token left out. Higher is better. The base model does not know the token, and draws better "
        "without it: what it scores then is as much as can be expected.",
    ),
    "pres": (
        "Is 'a {class}' still any {class}?",
        "PRES: how much pictures of the class look like the subject. Lower is better: as much as the base model's is good, more is bad.",
    ),
    "div": (
        "Do pictures of one prompt differ?",
        "DIV: the mean distance of pictures of the same prompt. Higher is better, below the base model's: near nought all are the same picture, and as high as "
        "that or higher the subject is not learnt. It differs less than the many that the base model draws, and in one place less than in several.",
    ),
    "class_div": (
        "Is there still more than one {class}?",
        "DIV of the class. The nearer the base model's the better: lower means that the class has narrowed.",
    ),
}

RULES = {
    "balance": "The highest balance is taken: how like the subject the pictures are, as a share of how like one another the photographs are (of 1, if there "
    "is but one), plus how well they fit the prompt, as a share of what the base model reaches without the token. Neither share counts for more than 1, "
    "so that 2 is all there is.",
    "subject": "The one whose pictures are likest to the subject is taken.",
}
"""Why a checkpoint became the model, by `evaluate.select`."""

CEILINGS = {"clip_t": "base, without the token"}
"""What a score's ceiling is, where it is not what the photographs score among themselves."""


@dataclass(frozen=True)
class Line:
    """A score for people: a question, what the score means, its numbers, and the name of its ceiling."""

    question: str
    meaning: str
    score: Score
    ceiling: str = "photographs"

    @property
    def told(self) -> str:
        """The score, with its interval in brackets."""
        value = number(self.score.value)
        return f"{value} ({number(self.interval[0])} to {number(self.interval[1])})" if self.interval else value

    @property
    def since(self) -> str:
        """The change since the base model, with its interval in brackets; empty without an interval, as the change may be chance."""
        if self.score.changed is None or self.score.floor is None:
            return ""
        change, low, high = (number(x, "+") for x in (self.score.value - self.score.floor, *self.score.changed))
        return f"{change} since the base model ({low} to {high})"

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.score.low is None or self.score.high is None else (self.score.low, self.score.high)

    @property
    def marks(self) -> list[tuple[str, float]]:
        """Names and values of what the score is to be compared with."""
        return [(name, x) for name, x in (("base", self.score.floor), (self.ceiling, self.score.ceiling)) if x is not None]

    @property
    def span(self) -> tuple[float, float]:
        """The ends of the bar: nought and all its numbers lie inside, or what hardly differs would look far apart."""
        numbers = [0.0, self.score.value, *(self.interval or ()), *(x for _, x in self.marks)]
        margin = 0.08 * (max(numbers) - min(numbers)) or 0.1
        return min(numbers) - margin, max(numbers) + margin

    def place(self, value: float) -> float:
        """Where a value lies on the bar, in percent."""
        low, high = self.span
        return 100 * (value - low) / (high - low)


def number(x: float, sign: str = "", form: str = ".3f") -> str:
    """A number as text, with a minus that is read aloud: screen readers pass over a hyphen before a number."""
    return f"{x:{sign}z{form}}".replace("-", "\u2212")


def report(run: Run) -> Path:
    """Evaluate a run, as far as it is not done, and write `report.html` from its manifests and pictures.

    Raises:
        RayboothError: if the packages that draw are not installed, or the run is not complete.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RayboothError(f"The report needs {error.name}: pip install 'raybooth[report]'.") from None
    evaluation.evaluate(run)
    path = run.workspace.root / FILE
    write_atomically(path, page(facts_of(run)).encode())
    run.workspace.push(FILE)
    run.say(f"report: {path}")
    return path


def page(facts: dict[str, Any]) -> str:
    """The report's HTML: the template, filled in."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("raybooth"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(**facts)


def facts_of(run: Run) -> dict[str, Any]:
    """What the template shows of a run that was evaluated."""
    config, scores, trained = run.config, evaluation.read(run), run.facts("fine-tuned-model")
    shown = {kind: [run.workspace.root / stage / n for n in names] for kind, (stage, names) in evaluation.pictures(run).items()}
    prompts = _before_after(run)
    classes = [shown[f"class-{when}"][:OF_CLASS] for when in ("before", "after")]
    photographs, strip = shown["instance"][:PHOTOGRAPHS], _strip(run, trained.get("selected"))
    rows = [photographs, *classes, *(p for _, *both, _ in prompts for p in both), *(p for _, p in (strip["lines"] if strip else ()))]
    manifests = {stage: m for stage in _stages(run, trained.get("selected")) if (m := run.manifest_of(stage))}
    return {
        "subject": config.subject,
        "kind": config.fill("A {class}"),
        "base": manifests["base-model"]["facts"].get("source", config.base.model),
        "uri": embedded(chain.from_iterable(rows)).__getitem__,
        "photographs": photographs,
        "learnt_from": len(shown["instance"]),
        "prompts": prompts,
        "asked": len(run.config.output_prompts),
        "classes": classes,
        "of_class": len(shown["class-after"]),
        "class_stages": [evaluation.class_before(run), "class-after-images"],
        "class_prompt": config.class_prompt,
        "scores": [Line(config.fill(q), m, scores[k], CEILINGS.get(k, "photographs")) for k, (q, m) in WORDS.items() if k in scores],
        "unscored": evaluation.unscored(run),
        "verdicts": verdicts(scores),
        "number": number,
        "strip": strip,
        "losses": plots.losses(trained["history"]) if trained["history"] else "",
        "taught": Prior.model_construct(**trained.get("configuration", {}).get("prior", {})).teacher,
        "times": plots.bars(_seconds(manifests)),
        "imported": trained.get("imported"),
        "where": trained.get("where", "an earlier version"),
        "digests": [(stage, m["digest"]) for stage, m in manifests.items()],
        **_again(run, trained),
    }


def _again(run: Run, trained: dict[str, Any]) -> dict[str, Any]:
    """How to make the run again: by the settings that the model was made with, perhaps not those of config.json, and those of drawing and scoring now."""
    now, imported = settings_of(run.config), trained.get("imported")
    made = trained.get("configuration", now)
    settings = made | {"generate": now["generate"], "evaluate": now["evaluate"] | {"select": made["evaluate"]["select"]}}
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    return {
        "configuration": text,
        "file": SETTINGS,
        "download": f"data:application/json;base64,{base64.b64encode(text.encode()).decode()}",
        "command": f"raybooth {f'import {shlex.quote(imported)}' if imported else 'run'} {SETTINGS} --storage ANOTHER-FOLDER",
        "versions": trained.get("versions", {}),
    }


def _before_after(run: Run) -> list[tuple[str, list[Path], list[Path], int]]:
    """The prompts, as many as one page can show, each with its first pictures by the base model and the fine-tuned one, and the number of all."""
    found = list(by_prompt(run, "output-images").items())[:PROMPTS]
    before, after = (run.workspace.root / stage for stage in ("before-images", "output-images"))
    return [(prompt, [before / n for n in names[:PER_PROMPT]], [after / n for n in names[:PER_PROMPT]], len(names)) for prompt, names in found]


def _stages(run: Run, selected: dict[str, Any] | None) -> list[str]:
    """The stages that this run's model, pictures and scores follow from, in the order of their making."""
    chosen = [*_checkpoint_stages(selected), "checkpoint-features"] if selected else []
    made = ["base-model", "encoders", "instance-images", evaluation.class_before(run), "latents", *chosen, "fine-tuned-model"]
    compared = ["distances"] if run.config.evaluate.lpips else []
    return [*made, "output-images", "before-images", "plain-images", "class-after-images", "features", *compared, "scores"]


def _checkpoint_stages(selected: dict[str, Any]) -> list[str]:
    """The stages of the checkpoints' pictures, the base model's first."""
    return [_checkpoint_stage(step) for step in (0, *(c["step"] for c in selected["candidates"]))]


def _checkpoint_stage(step: int) -> str:
    return f"{selection.FOLDER}/{step:07d}"


def _seconds(manifests: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The seconds of each stage, those of all checkpoints' pictures together."""
    total: dict[str, float] = {}
    for stage, manifest in manifests.items():
        name = stage.partition("/")[0]
        total[name] = total.get(name, 0) + manifest.get("seconds", 0)
    return total


def _strip(run: Run, selected: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the checkpoints drew, if it is still there: one column each, the base model's first, and one line per prompt."""
    if not selected:
        return None
    candidates = {c["step"]: c for c in selected["candidates"]}
    steps = [0, *columns(list(candidates), selected["step"])]
    stages = [_checkpoint_stage(step) for step in steps]
    if not run.manifest_of(stages[0]):
        return None
    if lost := [stage for stage in stages if not (held := run.manifest_of(stage)) or not run.workspace.intact(stage, held["facts"]["pictures"])]:
        run.say(f"report: without what the checkpoints drew: pictures of {lost[0]} are missing or damaged.")
        return None
    lines = []
    by_base, drawn = by_prompt(run, stages[0]), by_prompt(run, stages[1])
    for prompt, (name, *_) in drawn.items():
        plain = by_base.get(run.config.without_token(prompt), [name])[0]  # or with the token, in a run of an earlier version
        lines.append((prompt, [run.workspace.root / stages[0] / plain, *(run.workspace.root / stage / name for stage in stages[1:])]))
    scores, kept = [candidates[step] | _shares(candidates[step]) for step in steps[1:]], len(candidates)
    told = {"rule": selected["rule"], "why": RULES.get(selected["rule"], ""), "each": max(map(len, drawn.values()))}
    return {"steps": steps, "taken": selected["step"], **told, "lines": lines, "scores": scores, "kept": kept}


def _shares(candidate: dict[str, Any]) -> dict[str, str]:
    """The two shares whose sum is a candidate's balance; none if an earlier version scored it."""
    names = ("step", "dino", "clip_t", "own", "base")
    if not candidate.keys() >= set(names):
        return {}
    scored = selection.Candidate(**{name: candidate[name] for name in names})
    return {"subject_share": f" ({scored.subject:.0%})", "prompt_share": f" ({scored.prompt:.0%})"}


def columns(steps: list[int], taken: int) -> list[int]:
    """The checkpoints that fit beside the base model, however many there are: evenly spaced, among them the first, the last and the one taken."""
    most = COLUMNS - 1
    if len(steps) <= most:
        return steps
    even = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    nearest = min(even[1:-1], key=lambda step: abs(step - taken))
    return even if taken in even else [taken if step == nearest else step for step in even]


def embedded(paths: Iterable[Path]) -> dict[Path, str]:
    """Pictures as data URIs, as large and as good as the budget for all of them allows, and none larger than the original."""
    shown = Counter(paths)
    step = bisect_left(LADDER[:-1], True, key=lambda step: _fits(shown, *step))
    return {path: _uri(path, *LADDER[step]) for path in shown}


def _fits(shown: Counter[Path], side: int, quality: int) -> bool:
    """Whether all pictures are within the budget. Those that come after it is spent are not looked at."""
    return not any(total > BUDGET for total in accumulate(times * len(_uri(path, side, quality)) for path, times in shown.items()))


def _uri(path: Path, side: int, quality: int) -> str:
    """The picture as a data URI, of `side` pixels at most."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
