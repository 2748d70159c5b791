"""The paper's protocol on mini: its subjects, the recipes that are compared, and what a perfect model would score."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from raybooth.bench import Recipes
from raybooth.demo import photographs
from raybooth.dreambench import Subject
from raybooth.encoders import Pictures, Words, clip, vit
from raybooth.mini import FOLDER
from raybooth.mini.places import PLACES
from raybooth.mini.world import render, subject_scenes
from raybooth.score import Score, distances, diversity, pairwise_cosines, scored, to_prompt, to_subject

PICTURES, PHOTOGRAPHS = 4, 5
PERFECT = "the world itself, a perfect model"
# With the default 24 pictures of the class, PRES of ten subjects is uncertain by a quarter of itself (95% interval), with 256 by a twelfth.
PROTOCOL = ["evaluate.class_images=256"]
RECIPES: Recipes = {
    "raybooth": [],
    "raybooth without prior preservation": ["prior.images=0"],
    # Its learning rate times forty, as raybooth's own defaults for mini are forty times those for Stable Diffusion. Only 24
    # pictures of the class: each takes it ten times as long to draw.
    "2023 notebook": [
        "evaluate.class_images=24",
        "prior.scheduler=pndm", "prior.steps=50", "prior.guidance=7.5", "prior.weight=1", "prior.distill=false",
        "finetune.batch=2", "finetune.lr=2e-4", "finetune.text_encoder_lr=2e-4", "finetune.schedule=constant",
    ],
}  # fmt: skip
SUBJECTS = {"dog": (23, 1, 2), "cat": (1, 2, 3), "backpack": (1, 2), "car": (1, 2)}
"""Seeds of the drawn subjects of each class."""


def subjects_in(folder: Path) -> list[Subject]:
    """Ten drawn subjects of four classes, their photographs written below `folder`, with prompts of all places that mini knows."""
    subjects = []
    for kind, seeds in SUBJECTS.items():
        for seed in seeds:
            photos = folder / f"{kind}-{seed}" / "photographs"
            photographs(photos, seed, kind)
            subjects.append(Subject(f"{kind}-{seed}", kind, photos, tuple(f"photo of {{subject}} {place}" for place in PLACES)))
    return subjects


def perfect() -> dict[str, dict[str, Score]]:
    """Scores of what a model would draw that had learnt all of a subject and forgotten nothing: the world's own pictures of it, by subject."""
    dino, (pictures, words) = vit(FOLDER / "vit"), clip(FOLDER / "clip")
    return {f"{kind}-{seed}": _drawn_by_the_world(kind, seed, dino, pictures, words) for kind, seeds in SUBJECTS.items() for seed in seeds}


def _drawn_by_the_world(kind: str, seed: int, dino: Pictures, pictures: Pictures, words: Words) -> dict[str, Score]:
    first, *others = np.split(np.arange(PHOTOGRAPHS + PICTURES * len(PLACES)), [PHOTOGRAPHS + PICTURES * k for k in range(len(PLACES))])
    scenes = subject_scenes(seed, kind, PHOTOGRAPHS + PICTURES * len(PLACES))
    for place, numbers in zip(PLACES, others, strict=True):
        for k in numbers:
            scenes[k] = replace(scenes[k], place=place)
    images = [render(s) for s in scenes]
    found = {k: v.numpy() for k, v in (dino(images) | pictures(images)).items()}
    texts = words([f"photo of a {kind} {place}" for place in PLACES for _ in range(PICTURES)])["clip"].numpy()
    drawn, photos = ({k: v[part] for k, v in found.items()} for part in (slice(PHOTOGRAPHS, None), first))
    return {
        "dino": scored(to_subject(drawn["dino"], photos["dino"]), ceiling=float(pairwise_cosines(photos["dino"]).mean())),
        "clip_i": scored(to_subject(drawn["clip"], photos["clip"]), ceiling=float(pairwise_cosines(photos["clip"]).mean())),
        "clip_t": scored(to_prompt(drawn["clip"], texts)),
        "div": scored(diversity([distances(found["patches"][k]) for k in others])),
    }
