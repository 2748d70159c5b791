"""The whole run on mini: five pictures of one drawn dog, a personalised model, before and after."""

import shlex
from pathlib import Path

from raybooth import config as configuration
from raybooth import evaluation
from raybooth.config import Config
from raybooth.disk import explained
from raybooth.files import write_atomically
from raybooth.pictures import png
from raybooth.session import Run
from raybooth.stages import STAGES
from raybooth.verbs import do
from raybooth.workspace import Workspace

SUBJECT_SEED = 23  # of the dog, yellow with black patches
PLACES = ("in the snow", "on the beach", "in the city", "at night", "in the desert", "on the water")


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


def demo(storage: str, overrides: list[str]) -> None:
    """Run the demo, score it, write `before-after.png`, and print where everything lies."""
    config = demo_config(storage, overrides)
    with Run(config) as run:
        drawn = run.workspace.root / "photographs"
        if config.subject.photos == [str(drawn)]:
            with explained(config.storage, run.workspace.root):
                photographs(drawn)
        do(run, (*STAGES, "evaluate"))
        sheet = evaluation.before_after(run)
    print(f"\nlook at   {sheet}\npictures  {run.workspace.root / 'output-images'}\nmodel     {run.model_folder}  ({run.model_form})")
    print(f"one page  raybooth report --storage {shlex.quote(config.storage)}")
