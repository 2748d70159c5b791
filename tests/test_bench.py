"""The paper's protocol: its subjects and prompts from a folder, what runs share, and the table."""

import re
import shutil
from pathlib import Path

import pytest

from raybooth import bench
from raybooth.cli import main
from raybooth.dreambench import LIVE_PROMPTS, OBJECT_PROMPTS, Subject, subjects_of
from raybooth.errors import RayboothError
from raybooth.score import Score


def test_the_papers_prompts():
    assert len(set(OBJECT_PROMPTS)) == len(set(LIVE_PROMPTS)) == 25
    assert "a {subject} in the jungle" in LIVE_PROMPTS
    assert "a {subject} wearing a santa hat" in LIVE_PROMPTS
    assert "a cube shaped {subject}" in OBJECT_PROMPTS


def test_subjects_of_a_dataset(tmp_path: Path):
    for name in ("dog6", "teapot"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00.jpg").touch()
    (tmp_path / "notes").mkdir()
    with pytest.raises(RayboothError, match=r"has no prompts_and_classes\.txt"):
        subjects_of(tmp_path)
    listing = tmp_path / "prompts_and_classes.txt"
    listing.write_text("Classes\n\nsubject_name,class\ndog6,dog\nbear_plushie,stuffed animal\n\nPrompts\n'a {0} {1} in the jungle'.format(a, b),\n")
    with pytest.raises(RayboothError, match="does not say the class of teapot"):
        subjects_of(tmp_path)
    listing.write_text("subject_name,class\ndog6,dog\nteapot,teapot\n")
    dog, teapot = subjects_of(tmp_path)
    assert (dog.name, dog.class_name, dog.prompts) == ("dog6", "dog", LIVE_PROMPTS)
    assert (teapot.class_name, teapot.prompts) == ("teapot", OBJECT_PROMPTS)
    (tmp_path / "clone").mkdir()
    shutil.copytree(tmp_path / "dog6", tmp_path / "clone" / "dataset" / "dog6")
    shutil.copy(listing, tmp_path / "clone" / "dataset")
    assert [s.name for s in subjects_of(tmp_path / "clone")] == ["dog6"], "as google/dreambooth is laid out"


def test_subjects_as_people_call_them(tmp_path: Path):
    """Blanks, dots and hyphens, capitals, what a spreadsheet puts before the first line, folders of other programs."""
    for name in ("my dog", "rc.car", "shirt", "pony", ".thumbnails"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00.jpg").touch()
    listing = tmp_path / "prompts_and_classes.txt"
    listing.write_bytes("\ufeffmy dog,Dog\r\nrc.car, toy car\r\nshirt,t-shirt\r\npony,pony,live\r\n".encode())
    found = {s.name: (s.class_name, s.prompts) for s in subjects_of(tmp_path)}
    assert found == {
        "my dog": ("Dog", LIVE_PROMPTS), "rc.car": ("toy car", OBJECT_PROMPTS), "shirt": ("t-shirt", OBJECT_PROMPTS), "pony": ("pony", LIVE_PROMPTS),
    }  # fmt: skip
    listing.write_text("my dog,Dog,LIVE\nrc.car,toy car\nshirt,t-shirt\npony,pony,alive\n")
    with pytest.raises(RayboothError, match="says 'alive' of pony: write live or object"):
        subjects_of(tmp_path)
    listing.write_bytes("my dog,chien à la neige".encode("latin-1"))
    with pytest.raises(RayboothError, match="is not text in UTF-8"):
        subjects_of(tmp_path)


def test_a_setting_for_all_runs_leaves_the_rows_what_they_are(tmp_path: Path):
    """Or a row 'without prior preservation' could have it."""
    subject = Subject("a", "dog", tmp_path, ("photo of {subject}",))
    config = bench.config_of(subject, ["prior.images=0"], tmp_path, ["prior.images=8", "finetune.steps=2"], "mini")
    assert (config.prior.images, config.finetune.steps) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--storage", "s3://bucket/x"], "--storage s3://bucket/x is not a folder"),
        (["--storage", "{folder}/file"], "is not a folder"),
        (["--storage", "{folder}/new", "--set", "finetune.stepz=1"], "did you mean finetune.steps?"),
        (["--storage", "{folder}/new", "--set", "storage={folder}/one"], "give the folder of all with --storage"),
        (["--storage", "{folder}/new", "--base", "mini"], "leave --subjects and --base out"),
    ],
)
def test_what_is_wrong_shows_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
):
    monkeypatch.setattr("raybooth.minibench.perfect", None)
    (tmp_path / "file").write_text("the user's")
    assert main(["bench", "mini", *(a.format(folder=tmp_path) for a in arguments)]) == 2
    assert told in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "the user's"


@pytest.mark.parametrize("name", ["table.md", "scores.json"])
def test_a_users_file_is_not_written_over(tmp_path: Path, name: str):
    """But a bench's own is."""
    (tmp_path / "table.md").write_text(bench.table({}))
    (tmp_path / "scores.json").write_text('{"ours": {"dog": {"dino": {"value": 1}}}}')
    assert bench.root_of(str(tmp_path)) == tmp_path
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(RayboothError, match=f"{name} is none that a bench has made"):
        bench.root_of(str(tmp_path))


def test_a_row_is_the_mean_over_subjects():
    def scores(value: float, floor: float, ceiling: float | None) -> dict[str, Score]:
        return {"dino": Score(value, 0, 1, floor, ceiling), "clip_t": Score(value, 0, 1, 0.1, floor), "pres": Score(value, 0, 1, floor, ceiling)}

    text = bench.table({"ours": {"a": scores(0.8, 0.5, 1.0), "b": scores(0.4, 0.7, 0.5)}}, published=True)
    assert "| ours | 0.600 (80%) | - | 0.600 (100%) | 0.600 (0.600) | - | - |" in text
    assert "| DreamBooth, Stable Diffusion (paper) | 0.668 | 0.803 | 0.305 | - | - | - |" in text
    assert "paper" not in bench.table({})
    assert "| ours | -0.100 (95%) | - | -0.100 (90%) |" in bench.table({"ours": {"a": scores(-0.1, 0.0, -0.05)}}), "below anchors that have no parts"


def test_what_rows_differ_by_is_told_subject_by_subject():
    """Subjects are unlike one another, much more than two recipes on the same subject are."""

    def row(*values: float) -> dict[str, dict[str, Score]]:
        return {str(i): {"dino": Score(v, 0, 1, 0.0, 1.0)} for i, v in enumerate(values)}

    ours, theirs = (row(*(k / 10 + 0.2 - less for k in range(8))) for less in (0, 0.1))
    text = bench.table({"ours": ours, "theirs": theirs, "half-way": {"2": row(0, 0, 0.9)["2"]}})
    assert re.search(r"\| its 95% over subjects \| 0.[34]\d\d to 0.7\d\d \| - \|", text)
    assert "| less ours, 95% over subjects | -0.100 to -0.100 | - |" in text
    assert text.splitlines()[-1].startswith("| half-way | 0.900")


def test_rows_of_other_class_pictures_are_compared_by_what_they_have_changed():
    """Each recipe's base draws the class as its own [prior] says: that alone makes no recipe better."""

    def row(base: float) -> dict[str, dict[str, Score]]:
        return {str(i): {"pres": Score(base + 0.02, 0, 1, base, None), "dino": Score(base, 0, 1, 0.0, 1.0)} for i in range(8)}

    difference = bench.table({"ours": row(0.1), "theirs": row(0.3)}).splitlines()[-1]
    assert difference == "| less ours, 95% over subjects | +0.200 to +0.200 | - | - | +0.000 to +0.000 | - | - |"


def test_a_photograph_that_cannot_be_read_shows_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str], ray: None):
    from raybooth.demo import photographs

    photographs(tmp_path / "subjects" / "a", 1, "dog", 2)
    (tmp_path / "subjects" / "b").mkdir()
    (tmp_path / "subjects" / "b" / "0.jpg").write_text("no picture")
    (tmp_path / "subjects" / "prompts_and_classes.txt").write_text("a,dog\nb,dog\n")
    command = ["bench", "dreambench", "--subjects", str(tmp_path / "subjects"), "--base", "mini", "--storage", str(tmp_path / "bench")]
    assert main(command) == 2
    assert "0.jpg is not a picture that can be read" in capsys.readouterr().err
    assert not list((tmp_path / "bench").glob("*/*/class-images"))


def test_a_perfect_model_reaches_what_the_photographs_score_among_themselves():
    from raybooth.minibench import PERFECT, perfect

    scores = {PERFECT: perfect()}
    assert len(scores[PERFECT]) == 10
    for one in scores[PERFECT].values():
        assert one["dino"].ceiling is not None
        assert one["dino"].value > 0.9 * one["dino"].ceiling
        assert one["div"].value < 0.45  # of the base model, which draws another one each time, it is 0.5


def test_two_subjects_share_what_does_not_depend_on_them(tmp_path: Path, ray: None, fits_here: None):
    from raybooth.demo import photographs

    subjects = []
    for seed in (1, 2):
        photographs(tmp_path / f"photos{seed}", seed, "dog", 2)
        subjects.append(Subject(f"dog-{seed}", "dog", tmp_path / f"photos{seed}", ("photo of {subject} in the snow",)))
    small = ["prior.images=2", "prior.steps=2", "finetune.steps=2", "generate.steps=2"]
    text = bench.bench(subjects, {"ours": []}, tmp_path / "bench", small, "mini")
    assert text.count("\n") == 3
    assert (tmp_path / "bench" / "table.md").read_text() == text
    roots = [tmp_path / "bench" / s.name / "ours" for s in subjects]
    for shared in ("base-model/unet/diffusion_pytorch_model.safetensors", "class-images/00001.png"):
        first, second = ((root / shared).stat() for root in roots)
        assert first.st_ino == second.st_ino
    one, other = ((root / "fine-tuned-model/unet/diffusion_pytorch_model.safetensors").read_bytes() for root in roots)
    assert one != other
