"""The best checkpoint: the kept ones draw a few pictures each, and the best of them becomes the fine-tuned model."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from raybooth.drawing import draw, model_bytes, output_prompts, output_rows, photographs
from raybooth.encoder_files import prepare_encoders
from raybooth.features import features, scored_prompt, shows_subject
from raybooth.score import among, share, to_prompt, to_subject
from raybooth.session import Run

FOLDER = "checkpoint-images"
PROMPTS, EACH = 4, 2  # the first that show the subject, and pictures of each; their seeds are not those of the output


@dataclass(frozen=True)
class Candidate:
    """A checkpoint's scores. `own` is DINO among the photographs, `floor` CLIP-T of the base model on the same prompts and seeds."""

    step: int
    dino: float
    clip_t: float
    own: float
    floor: float

    @property
    def balance(self) -> float:
        """How much of what can be had of the subject, and how much of the prompt is kept, each at most whole."""
        return min(1.0, share(self.dino, self.own)) + min(1.0, share(self.clip_t, self.floor))


RULES: dict[str, Callable[[Candidate], float]] = {"balance": lambda c: c.balance, "subject": lambda c: c.dino}


def candidates(run: Run, checkpoints: Mapping[int, str]) -> list[Candidate]:
    """Scores of the checkpoints (step -> folder in the storage), in their order. Step 0 is the base model, drawn for comparison.

    The pictures lie in `checkpoint-images/<step>/`.
    """
    prepare_encoders(run)
    rows, shown = rows_of(run), {step: f"{FOLDER}/{step:07d}" for step in (0, *checkpoints)}
    for step, folder in shown.items():
        draw(run, folder, checkpoints.get(step, "base-model"), run.config.generate, rows, {"seed": run.config.seed})
    names = [r["name"] for r in rows]
    pictures = {"photographs": ("instance-images", photographs(run))} | {f: (f, names) for f in shown.values()}
    found = features(run, "checkpoint-features", pictures, [scored_prompt(run, r["prompt"]) for r in rows])
    subject, texts = found["photographs"]["dino"], found["prompts"]["clip"]
    own = float(among(subject).mean()) if len(subject) > 1 else 1.0
    floor = float(to_prompt(found[shown[0]]["clip"], texts).mean())

    def scored(step: int) -> Candidate:
        pictures = found[shown[step]]
        return Candidate(step, float(to_subject(pictures["dino"], subject).mean()), float(to_prompt(pictures["clip"], texts).mean()), own, floor)

    return [scored(step) for step in checkpoints]


def rows_of(run: Run) -> list[dict[str, Any]]:
    """What every checkpoint draws: the subject, if need be by the prompt that it was learnt by."""
    prompts = [p for p in output_prompts(run) if shows_subject(run, p)] or [run.config.subject.prompt]
    return output_rows(run, "checkpoint", EACH, prompts[:PROMPTS])


def select(run: Run, checkpoints: Mapping[int, str], target: str) -> dict[str, Any]:
    """Choose by `evaluate.select`, and if it is not the last one, write it into the storage's folder `target`. Returns what was found, as facts."""
    from raybooth import tuning
    from raybooth.cluster.rows import map_rows

    rule, found = run.config.evaluate.select, candidates(run, checkpoints)
    best = max(found, key=lambda c: (RULES[rule](c), c.step))
    for c in found:
        marks = f"subject {share(c.dino, c.own):.0%} of the photographs' own, prompt {share(c.clip_t, c.floor):.0%} of the base model's"
        run.say(f"checkpoint {c.step}: {marks}{'; taken' if c is best else ''}")
    if best.step != max(checkpoints):
        shutil.rmtree(run.workspace.root / target, ignore_errors=True)  # the last step's: a pull would take it for the one that another machine has made
        make = partial(tuning.exporter, run.workspace.uri, checkpoints[best.step], target)
        list(map_rows(make, [{"name": "model"}], batch=1, have=run.ray, retries=run.config.cluster.retries, model_bytes=model_bytes(run, "base-model")))
        run.workspace.pull("fine-tuned-model")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows_of(run)))
    drawn = {"prompts": prompts, **run.config.generate.model_dump(include={"steps", "guidance", "scheduler"})}
    return {"rule": rule, "step": best.step, "drawn": drawn, "candidates": [asdict(c) | {"balance": c.balance} for c in found]}
