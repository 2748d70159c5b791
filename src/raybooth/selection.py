"""The best checkpoint: the kept ones draw a few pictures each, and the best of them becomes the fine-tuned model."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from raybooth.drawing import draw, model_bytes, output_rows, photographs, sampling
from raybooth.encoder_files import prepare_encoders
from raybooth.features import features
from raybooth.score import pairwise_cosines, share, to_prompt, to_subject
from raybooth.session import Run

FOLDER = "checkpoint-images"
PROMPTS, EACH = 4, 2  # the first that show the subject, and pictures of each; their seeds are not those of the output


@dataclass(frozen=True)
class Candidate:
    """A checkpoint's scores.

    `own` is DINO among the photographs, None if there is only one. `base` is the base model's CLIP-T, for the same seeds and the same prompts without the
    token: what it makes of a word that it has never met is easily beaten, and would let much be forgotten.
    """

    step: int
    dino: float
    clip_t: float
    own: float | None
    base: float

    @property
    def balance(self) -> float:
        """The share of the subject that is reached plus the share of the prompt that is kept, each at most 1."""
        return min(1.0, self.subject) + min(1.0, self.prompt)

    @property
    def subject(self) -> float:
        """DINO as a share of the photographs' own, or of 1 if there is only one photograph."""
        return share(self.dino, 1.0 if self.own is None else self.own)

    @property
    def prompt(self) -> float:
        return share(self.clip_t, self.base)


RULES: dict[str, Callable[[Candidate], float]] = {"balance": lambda c: c.balance, "subject": lambda c: c.dino}


def candidates(run: Run, checkpoints: Mapping[int, str]) -> list[Candidate]:
    """Scores of the checkpoints (step -> folder in the storage), in their order. Step 0 is the base model, which draws the prompts without the token.

    The pictures lie in `checkpoint-images/<step>/`.
    """
    prepare_encoders(run)
    shown = {step: f"{FOLDER}/{step:07d}" for step in (0, *checkpoints)}
    rows = {step: rows_of(run) for step in checkpoints} | {0: rows_of(run, plain=True)}
    for step, folder in shown.items():
        draw(run, folder, checkpoints.get(step, "base-model"), run.config.generate, rows[step], {"seed": run.config.seed})
    pictures = {"photographs": ("instance-images", photographs(run))} | {f: (f, [r["name"] for r in rows[step]]) for step, f in shown.items()}
    found = features(run, "checkpoint-features", pictures, [r["prompt"] for r in rows[0]])
    subject, texts = found["photographs"]["dino"], found["prompts"]["clip"]
    own = float(pairwise_cosines(subject).mean()) if len(subject) > 1 else None
    base = float(to_prompt(found[shown[0]]["clip"], texts).mean())

    def scored(step: int) -> Candidate:
        pictures = found[shown[step]]
        return Candidate(step, float(to_subject(pictures["dino"], subject).mean()), float(to_prompt(pictures["clip"], texts).mean()), own, base)

    return [scored(step) for step in checkpoints]


def rows_of(run: Run, plain: bool = False) -> list[dict[str, Any]]:
    """Rows that every checkpoint draws: of the subject, if need be by the prompt that it was learnt by; `plain` for the base model: without the token."""
    prompts = [p for p in run.config.output_prompts if run.config.shows_subject(p)] or [run.config.subject.prompt]
    return output_rows(run, "checkpoint", EACH, [run.config.without_token(p) if plain else p for p in prompts[:PROMPTS]])


def select(run: Run, checkpoints: Mapping[int, str], target: str) -> dict[str, Any]:
    """Choose a checkpoint by `evaluate.select` and, unless it is the last, write it into the storage's folder `target`. Returns what was found, as facts."""
    from raybooth import finetune_job
    from raybooth.cluster.rows import map_rows

    rule, found = run.config.evaluate.select, candidates(run, checkpoints)
    best = max(found, key=lambda c: (RULES[rule](c), c.step))
    for c in found:
        subject = f"{c.dino:.2f}" if c.own is None else f"{c.subject:.0%} of the photographs' own"
        marks = f"subject {subject}, prompt {c.prompt:.0%} of the base model's without the token"
        run.say(f"checkpoint {c.step}: {marks}{'; taken' if c is best else ''}")
    if best.step != max(checkpoints):
        shutil.rmtree(run.workspace.root / target, ignore_errors=True)  # else a pull would keep the last step's in place of what another machine has made
        make = partial(finetune_job.exporter, run.workspace.uri, checkpoints[best.step], target)
        cluster, size = run.config.cluster, model_bytes(run, "base-model")
        list(map_rows(make, [{"name": "model"}], batch=1, have=run.ray, retries=cluster.retries, say=run.say, model_bytes=size))
        run.workspace.pull("fine-tuned-model")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows_of(run)))
    how = sampling(run, run.config.generate)
    drawn = {"prompts": prompts, "steps": how.steps, "guidance": how.guidance, "scheduler": how.scheduler}
    return {"rule": rule, "step": best.step, "drawn": drawn, "candidates": [asdict(c) | {"balance": c.balance} for c in found]}
