"""What the scores say of a run, and what they say to change."""

import pytest

from raybooth.score import Score
from raybooth.verdict import verdicts


def scores(dino: float, clip_t: float, class_div: float) -> dict[str, Score]:
    return {
        "dino": Score(dino, None, None, floor=0.2, ceiling=0.8),
        "clip_t": Score(clip_t, None, None, floor=0.1, ceiling=0.3),
        "class_div": Score(class_div, None, None, floor=0.5, ceiling=None),
    }


def test_what_can_be_expected_is_all():
    assert [v.share for v in verdicts(scores(0.8, 0.3, 0.5))] == pytest.approx([1, 1, 1])
    assert all(v.is_enough for v in verdicts(scores(0.7, 0.29, 0.45)))


@pytest.mark.parametrize(
    ("low", "about", "share", "change"),
    [(scores(0.2, 0.3, 0.5), "subject", 0, "raise finetune.steps"), (scores(0.8, 0.2, 0.5), "prompts", 2 / 3, "lower finetune.steps"),
     (scores(0.8, 0.3, 0.2), "class", 0.4, "prior.distill")],
)  # fmt: skip
def test_what_is_little_is_said_with_what_to_change(low: dict[str, Score], about: str, share: float, change: str):
    (verdict,) = (v for v in verdicts(low) if not v.is_enough)
    assert (verdict.about, verdict.share) == (about, pytest.approx(share))
    assert change in str(verdict)
    assert not any(change in str(v) for v in verdicts(scores(0.8, 0.3, 0.5)))


def test_nothing_is_said_of_what_is_compared_with_nothing():
    """One photograph has no other to be compared with; no prompt may show the subject; a model's photographs may be less alike than what the base draws."""
    unknown = {"dino": Score(0.5, None, None, 0.2, None), "clip_t": Score(0.3, None, None, None, None)}
    assert verdicts(unknown) == verdicts({}) == verdicts({"dino": Score(0.5, None, None, floor=0.4, ceiling=0.3)}) == []
