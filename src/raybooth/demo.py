"""The whole run on mini: five pictures of one drawn dog, a personalised model, before and after."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from raybooth import config as configuration
from raybooth import evaluation
from raybooth.config import Config
from raybooth.disk import explained
from raybooth.files import write_atomically
from raybooth.pictures import png
from raybooth.score import pairwise_cosines
from raybooth.session import Run
from raybooth.stages import STAGES
from raybooth.verbs import do
from raybooth.workspace import Workspace

SUBJECT_SEED = 23  # of the dog, yellow with black patches
PLACES = ("in the snow", "on the beach", "in the city", "at night", "in the desert", "on the water")


@dataclass(frozen=True)
class Scores:
    """The scores of a run by mini's encoders. Similarities are cosines; ceilings are the photographs' own, and for prompts the base's without the token."""

    subject_before: float
    subject_after: float
    subject_ceiling: float
    prompt_before: float
    prompt_after: float
    prompt_ceiling: float | None
    class_distance_before: float
    class_distance_after: float

    @property
    def subject_gain(self) -> float:
        """Share of the way from the base model's similarity to the photographs' own."""
        return (self.subject_after - self.subject_before) / (self.subject_ceiling - self.subject_before)

    @property
    def prompt_kept(self) -> float:
        return self.prompt_after / self.prompt_before

    @property
    def class_kept(self) -> float:
        return self.class_distance_after / self.class_distance_before

    @property
    def _of_ceiling(self) -> str:
        known = self.prompt_ceiling
        return f", and {self.prompt_after / known:.0%} of the {known:.3f} that the base model has without the token" if known else ""

    def __str__(self) -> str:
        return (
            f"subject   similarity to the photographs {self.subject_before:.3f} before, {self.subject_after:.3f} after, "
            f"{self.subject_ceiling:.3f} among themselves: {self.subject_gain:.0%} of the way\n"
            f"prompt    CLIP-T {self.prompt_before:.3f} before, {self.prompt_after:.3f} after: {self.prompt_kept:.0%} of before{self._of_ceiling}\n"
            f"class     mean distance {self.class_distance_before:.3f} before, {self.class_distance_after:.3f} after: {self.class_kept:.0%} kept"
        )


def demo_config(storage: str, overrides: list[str]) -> Config:
    """The demo's configuration: mini, its own defaults, a drawn dog unless `overrides` bring another subject, and places that mini knows."""
    prompts = [f"photo of {{subject}} {place}" for place in PLACES]
    made = configuration.load(
        None,
        overrides,
        subject={"class": "dog"},
        base={"model": "mini"},
        # A quarter fewer steps than mini's own, to take less than five minutes on any two cores, at twice the rate, which makes its patches black, not brown.
        finetune={"steps": 300, "lr": 4e-4, "checkpoints": 4},
        generate={"prompts": prompts},
        evaluate={"select": "balance"},
        storage=storage,
    )
    drawn = [str(Workspace(made.storage).root / "photographs")]
    return made if made.subject.photos else made.model_copy(update={"subject": made.subject.model_copy(update={"photos": drawn})})


def photographs(folder: Path, seed: int = SUBJECT_SEED, kind: str = "dog", n: int = 5) -> None:
    """Write `n` pictures of one subject of mini's world into `folder`, as a user would bring them, unless they are there."""
    from raybooth.mini.world import render, subject_scenes

    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(subject_scenes(seed, kind, n)):
        path = folder / f"{i}.png"
        if not path.exists():
            write_atomically(path, png(render(scene)))


def demo(storage: str, overrides: list[str], quiet: bool = False) -> Scores | None:
    """Run the demo, write `before-after.png`, and print where everything lies and the scores, which are returned; None as in score()."""
    config = demo_config(storage, overrides)
    with Run(config, quiet) as run:
        drawn = run.workspace.root / "photographs"
        if config.subject.photos == [str(drawn)]:
            with explained(config.storage, run.workspace.root):
                photographs(drawn)
        do(run, (*STAGES, "evaluate"))
        sheet = evaluation.before_after(run)
        scores = score(run)
    print(f"\n{scores}\n" if scores else "")
    print(f"look at   {sheet}\npictures  {run.workspace.root / 'output-images'}\nmodel     {run.model_folder}  ({run.model_form})")
    print(f"one page  raybooth report --storage {shlex.quote(config.storage)}")
    return scores


def score(run: Run) -> Scores | None:
    """The scores of a run that was evaluated. None if no prompt shows the subject, or only one photograph was given: it has no other to compare it with."""
    scores, found = evaluation.read(run), evaluation.measured(run)
    dino, clip_t = scores.get("dino"), scores.get("clip_t")
    if not dino or not clip_t or dino.ceiling is None or dino.floor is None or clip_t.floor is None:
        return None
    distance = {when: float(1 - pairwise_cosines(found[f"class-{when}"]["clip"]).mean()) for when in ("before", "after")}
    return Scores(dino.floor, dino.value, dino.ceiling, clip_t.floor, clip_t.value, clip_t.ceiling, distance["before"], distance["after"])
