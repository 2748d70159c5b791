"""The whole way on mini, and whether it worked, in figures: a broken loss, a dropped token or a missing prior fails here."""

import shutil
from pathlib import Path

import pytest

from raybooth import evaluation
from raybooth.demo import demo, demo_config
from raybooth.drawing import class_rows, draw
from raybooth.features import features
from raybooth.score import Array, Score, pairwise_cosines
from raybooth.session import Run
from raybooth.verbs import do
from raybooth.verdict import verdicts

pytestmark = pytest.mark.usefixtures("ray")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo(str(folder), [])
    return folder


@pytest.fixture(scope="module")
def class_distances(storage: Path) -> dict[str, float]:
    """The mean distance of the class's pictures from one another, before and after."""
    with Run(demo_config(str(storage), []), quiet=True) as run:
        found = evaluation.measured(run)
    return {when: distance(found[f"class-{when}"]["clip"]) for when in ("before", "after")}


def distance(features: Array) -> float:
    return float(1 - pairwise_cosines(features).mean())


def scores_of(storage: Path) -> dict[str, Score]:
    with Run(demo_config(str(storage), []), quiet=True) as run:
        return evaluation.read(run)


def test_the_subject_is_learnt(storage: Path):
    """Of the way from the base model's similarity to the photographs' own, two thirds at least."""
    dino = scores_of(storage)["dino"]
    assert dino.floor is not None
    assert dino.ceiling is not None
    assert (dino.value - dino.floor) / (dino.ceiling - dino.floor) >= 2 / 3


def test_the_prompts_are_still_followed(storage: Path):
    clip_t = scores_of(storage)["clip_t"]
    assert clip_t.floor is not None
    assert clip_t.value / clip_t.floor >= 0.93


def test_the_class_stays_various(class_distances: dict[str, float]):
    assert class_distances["after"] / class_distances["before"] >= 0.80


def test_what_is_said_of_it_is_that_it_worked(storage: Path):
    said = verdicts(scores_of(storage))
    assert [v.about for v in said if v.is_enough] == ["subject", "prompts", "class"]


def test_it_ends_in_one_picture_of_it_all(storage: Path):
    from PIL import Image

    with Image.open(storage / "before-after.png") as sheet:
        assert min(sheet.size) > 500


def test_without_class_images_the_class_drifts(class_distances: dict[str, float], storage: Path, tmp_path: Path):
    """The paper's finding, and that the prior does something: a quarter of the steps without it lose what all of them with it have kept."""
    for stage in ("base-model", "photographs", "encoders"):
        shutil.copytree(storage / stage, tmp_path / stage)
    with Run(demo_config(str(tmp_path), ["prior.images=0", "finetune.steps=75", "evaluate.select=last"]), quiet=True) as run:
        do(run, ["prepare", "encode", "finetune"])
        rows = class_rows(run, evaluation.CLASS_PICTURES)
        draw(run, "class-after-images", "fine-tuned-model", run.config.prior, rows, {})
        found = features(run, "features", {"after": ("class-after-images", [r["name"] for r in rows])}, [])
    drifted = distance(found["after"]["clip"])
    assert drifted / class_distances["before"] < 0.80
    assert drifted < class_distances["after"] - 0.1 * class_distances["before"]


def test_the_report_shows_how_it_learnt(storage: Path):
    """Base and three checkpoints of four prompts, and what was taken."""
    with Run(demo_config(str(storage), []), quiet=True) as run:
        do(run, ["report"])
    text = (storage / "report.html").read_text()
    assert text.count('class="taken"') == 1
    assert "The class was taught by the base model" in text
    assert [f"step {s}" in text for s in (100, 200, 300)] == [True] * 3
    assert len(text) < 5_000_000


def test_real_photographs_run_through_without_special_care(storage: Path, tmp_path: Path):
    """They teach mini little; nothing may fail."""
    from raybooth.cli import main

    photographs = Path(__file__).parent / "photographs"
    settings = ["prior.images=8", "prior.steps=4", "finetune.steps=4", "generate.steps=4", "generate.images_per_prompt=1"]
    arguments = [part for s in settings for part in ("--set", s)]
    assert main(["run", "--photos", str(photographs), "--class", "dog", "--base", "mini", "--storage", str(tmp_path), *arguments]) == 0
    assert len(list((tmp_path / "instance-images").glob("0*.png"))) == 5
    assert len(list((tmp_path / "output-images").glob("photo-of-*.png"))) == 6
