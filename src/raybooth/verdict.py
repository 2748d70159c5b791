"""Whether a run worked: of the subject, the prompts and the class, how much is reached of what can be expected, and what to change if that is little."""

from collections.abc import Mapping
from dataclasses import dataclass

from raybooth.score import Score, share


@dataclass(frozen=True)
class Verdict:
    """How much is reached of what can be expected of one thing, and what to change if it is less than `enough`. The bounds are those of the demo's test.

    Attributes:
        share: 1 is all that can be expected; below 0 it is worse than the base model.
        of: what the share is of, for people.
    """

    about: str
    share: float
    of: str
    enough: float
    advice: str

    @property
    def is_enough(self) -> bool:
        return self.share >= self.enough

    def __str__(self) -> str:
        told = f"{self.about:<8} {self.share:>5.0%} {self.of}"
        return told if self.is_enough else f"{told}: {self.advice}"


def verdicts(scores: Mapping[str, Score]) -> list[Verdict]:
    """One for each of subject, prompts and class of which the scores and what they are compared with are known.

    The subject is judged by DINO, from the base model's to the photographs' own; the prompts by CLIP-T, of the base model's in words that it knows; the
    class by its DIV, of the base model's.
    """
    dino, clip_t, of_class = (scores.get(name) for name in ("dino", "clip_t", "class_div"))
    found = []
    if dino and dino.floor is not None and dino.ceiling is not None and dino.floor < dino.ceiling:
        way = (dino.value - dino.floor) / (dino.ceiling - dino.floor)
        advice = "raise finetune.steps, then finetune.lr, or give better photographs"
        found.append(Verdict("subject", way, "of the way from the base model's pictures to the photographs", 2 / 3, advice))
    if clip_t and clip_t.ceiling is not None:
        advice = "lower finetune.steps, then finetune.lr, or give more varied photographs"
        kept = share(clip_t.value, clip_t.ceiling)
        found.append(Verdict("prompts", kept, "of how well the base model draws them in words that it knows", 0.93, advice))
    if of_class and of_class.floor is not None:
        advice = "give class pictures (prior.images), set prior.distill = true, or lower finetune.steps"
        found.append(Verdict("class", share(of_class.value, of_class.floor), "of the variety that the base model has", 0.8, advice))
    return found
