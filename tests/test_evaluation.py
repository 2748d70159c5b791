"""The scores against plain transformers, against pictures whose order is known, and as a stage."""

import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stored import on_mini, teach
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, ViTModel

from raybooth import evaluation, reporting, selection
from raybooth.config import Config
from raybooth.drawing import picture_seed
from raybooth.encoders import clip, vit
from raybooth.errors import RayboothError
from raybooth.jobs import drawing_digest
from raybooth.mini import FOLDER
from raybooth.mini.world import render, subject_scenes
from raybooth.score import Array, Score, distances, diversity, pairwise_cosines, scored, scored_pairs, to_prompt, to_subject
from raybooth.verbs import do


@pytest.fixture(scope="module")
def subject() -> list[Image.Image]:
    return [render(s) for s in subject_scenes(23)]


@pytest.fixture(scope="module")
def others() -> list[Image.Image]:
    return [render(s) for seed in range(40, 46) for s in subject_scenes(seed)[:1]]


def test_they_are_what_transformers_says(subject: list[Image.Image], others: list[Image.Image]):
    """DINO, CLIP-I and CLIP-T by a plain computation on the same pictures."""
    prompts = [f"photo of a {c} dog" for c in ("red", "brown", "white", "black", "grey", "blue")]
    pixels = [AutoImageProcessor.from_pretrained(FOLDER / "vit", backend="pil")(images=x, return_tensors="pt")["pixel_values"] for x in (others, subject)]
    model = ViTModel.from_pretrained(FOLDER / "vit", add_pooling_layer=False, dtype=torch.float32).eval()
    both = CLIPModel.from_pretrained(FOLDER / "clip", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(FOLDER / "clip")(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = (model(p).last_hidden_state[:, 0] for p in pixels)
        dino = torch.stack([torch.cosine_similarity(x[None], b).mean() for x in a]).mean()
        out = both(input_ids=ids, pixel_values=pixels[0])
        theirs = both.get_image_features(pixel_values=pixels[1])
        theirs = getattr(theirs, "pooler_output", theirs)
        clip_i = torch.stack([torch.cosine_similarity(x[None], theirs).mean() for x in out.image_embeds]).mean()
        clip_t = (out.image_embeds * out.text_embeds).sum(-1).mean()
    pictures, words = clip(FOLDER / "clip")
    drawn, photographs = pictures(others)["clip"].numpy(), pictures(subject)["clip"].numpy()
    assert to_subject(*(vit(FOLDER / "vit")(x)["dino"].numpy() for x in (others, subject))).mean() == pytest.approx(float(dino), abs=1e-5)
    assert to_subject(drawn, photographs).mean() == pytest.approx(float(clip_i), abs=1e-5)
    assert to_prompt(drawn, words(prompts)["clip"].numpy()).mean() == pytest.approx(float(clip_t), abs=1e-5)


def test_itself_then_shifted_then_others_then_noise(subject: list[Image.Image], others: list[Image.Image]):
    shifted = [Image.fromarray(np.roll(np.asarray(im), 6, axis=1)) for im in subject]
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(5)]
    encode, (pictures, _) = vit(FOLDER / "vit"), clip(FOLDER / "clip")
    for features in (lambda x: encode(x)["dino"].numpy(), lambda x: pictures(x)["clip"].numpy()):
        own = features(subject)
        order = [float(to_subject(features(x), own).mean()) for x in (subject, shifted, others, noise)]
        assert order == sorted(order, reverse=True)
        assert order[0] > order[2] + 0.05


def test_diversity_is_none_among_equals_and_grows_with_difference(subject: list[Image.Image], others: list[Image.Image]):
    encode = vit(FOLDER / "vit")
    nearly = [subject[0], subject[0].point(lambda v: min(255, v + 8))]
    same, alike, various = (encode(x)["patches"].numpy() for x in ([subject[0]] * 3, nearly, others))

    def div(patches: Array) -> float:
        return float(diversity([distances(patches)])[0])

    assert div(same) == pytest.approx(0, abs=1e-6)
    assert 0 < div(alike) < div(various)
    a, b = torch.from_numpy(various[:1]), torch.from_numpy(various[1:2])
    by_hand = (2 - 2 * torch.cosine_similarity(a, b, dim=-1)).mean()  # the squared distance of unit vectors
    assert div(various[:2]) == pytest.approx(float(by_hand), abs=1e-5)
    pairs = [torch.cosine_similarity(a, b, dim=-1) for a, b in combinations(torch.from_numpy(various), 2)]
    assert div(various) == pytest.approx(float((2 - 2 * torch.stack(pairs)).mean()), abs=1e-5)


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400).astype(np.float32)
    score = scored(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (score.low, score.high) == pytest.approx((score.value - half, score.value + half), abs=0.002)
    assert scored(values) == score
    assert len(pairwise_cosines(np.eye(4, dtype=np.float32))) == 6


def test_the_interval_of_a_diversity_holds_the_truth_as_often_as_it_says():
    """As if pairs were independent it would hold it two times of three."""
    rng = np.random.default_rng(0)
    every = rng.normal(size=(60, 1, 6)) * rng.uniform(0.1, 1, size=(60, 1, 1)) + np.eye(6)[0]
    every = (every / np.linalg.norm(every, axis=-1, keepdims=True)).astype(np.float32)
    found = [scored_pairs(distances(every[rng.integers(60, size=20)]), draws=400) for _ in range(200)]
    truth = float(distances(every).mean())
    held = np.mean([s.low < truth < s.high for s in found])  # type: ignore[operator]
    assert 0.85 < held < 0.99


def test_a_single_value_has_no_interval_and_two_pictures_are_a_single_pair(others: list[Image.Image]):
    apart = distances(vit(FOLDER / "vit")(others[:3])["patches"].numpy())
    one, two, three = scored(np.array([0.5], np.float32), np.array([0.1], np.float32)), scored_pairs(apart[:2, :2]), scored_pairs(apart)
    assert (one.value, one.low, one.high, one.floor) == (0.5, None, None, pytest.approx(0.1))
    assert two.value == pytest.approx(diversity([apart[:2, :2]])[0])
    assert three.value == pytest.approx(diversity([apart])[0])
    assert two.low is None
    assert three.low is not None
    assert three.high is not None
    assert three.low < three.value < three.high


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, photos: Path, ray: None) -> Path:
    """A run that has learnt something, drawn and scored."""
    storage = tmp_path_factory.mktemp("evaluated")
    with on_mini(storage, photos) as run:
        do(run, ["prepare", "class-images"])
        teach(run, 1)
        do(run, ["generate", "evaluate"])
    return storage


@pytest.fixture
def storage(evaluated: Path, tmp_path: Path, in_process: None) -> Path:
    """A copy of it, to do something more with."""
    return Path(shutil.copytree(evaluated, tmp_path / "storage", symlinks=True))


def test_what_is_scored_is_what_this_configuration_asks_for(storage: Path, photos: Path):
    prompts = ["photo of unqtkn dog at night", "photo of unqtkn dog on the beach"]
    with on_mini(storage, photos, "generate.images_per_prompt=3", f"generate.prompts={prompts}", "prior.steps=3") as run:
        do(run, ["evaluate"])
        found, scores = evaluation.measured(run), evaluation.read(run)
        words = clip(FOLDER / "clip")[1](["photo of a dog at night"] * 3 + ["photo of a dog on the beach"] * 3)["clip"].numpy()
        assert scores["clip_t"].value == pytest.approx(to_prompt(found["output"]["clip"], words).mean(), abs=1e-5)
        patches = found["output"]["patches"]
        assert scores["div"].value == pytest.approx(diversity([distances(patches[:3]), distances(patches[3:])]).mean(), abs=1e-6)
        assert evaluation.class_before(run) == "class-before-images", "the class images were drawn in fewer steps"
        assert run.workspace.manifest("class-before-images")["inputs"]["steps"] == 3
        assert evaluation.before_after(run).exists()


def test_only_prompts_that_show_the_subject_tell_how_like_it_the_pictures_are(storage: Path, photos: Path):
    prompts = ["photo of a {class} in the snow", "photo of {subject} at night", "photo of a car", "a {token} on the beach"]
    with on_mini(storage, photos, f"generate.prompts={prompts}") as run:
        do(run, ["evaluate"])
        found, scores = evaluation.measured(run), evaluation.read(run)
        shown = [2, 3, 6, 7]
        for name, kind in (("dino", "dino"), ("clip_i", "clip")):
            own = found["instance"][kind]
            assert scores[name].value == pytest.approx(to_subject(found["output"][kind][shown], own).mean(), abs=1e-6)
            assert scores[name].floor == pytest.approx(to_subject(found["before"][kind][shown], own).mean(), abs=1e-6)
        assert scores["clip_t"].value == pytest.approx(to_prompt(found["output"]["clip"], found["prompts"]["clip"]).mean(), abs=1e-6)
        patches = found["output"]["patches"]
        assert scores["div"].value == pytest.approx(diversity([distances(patches[i : i + 2]) for i in range(0, 8, 2)]).mean(), abs=1e-6)


def test_where_no_prompt_shows_the_subject_a_sentence_says_so(storage: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    with on_mini(storage, photos, "generate.prompts=['photo of a {class} in the snow']") as run:
        run.quiet = False
        do(run, ["evaluate"])
        assert set(evaluation.read(run)) == {"clip_t", "pres", "div", "class_div"}
        assert "No prompt of generate.prompts has {subject} or {token} in it" in capsys.readouterr().err
        page = reporting.page(reporting.facts_of(run))
    assert "No prompt of generate.prompts has" in page
    assert "Is it the subject?" not in page


def test_the_class_is_scored_by_as_many_pictures_as_asked_for(storage: Path, photos: Path):
    """Those that are there are not drawn again; of the base model's, the class images are part."""
    with on_mini(storage, photos) as run:
        few = run.outputs("class-after-images")
    with on_mini(storage, photos, f"evaluate.class_images={len(few) + 2}") as run:
        do(run, ["evaluate"])
        more = run.outputs("class-after-images")
        assert len(run.facts("class-after-images")["pictures"]) == len(few) + 2
        assert few.items() - more.items() == {("contact-sheet.png", few["contact-sheet.png"])}
        shown = evaluation.pictures(run)
        assert shown["class-before"] == ("class-before-images", shown["class-after"][1])
        found = evaluation.measured(run)
        expected = to_subject(found["class-after"]["dino"], found["instance"]["dino"])
        assert len(expected) == len(few) + 2
        assert evaluation.read(run)["pres"].value == pytest.approx(expected.mean(), abs=1e-6)


def test_what_is_scored_is_the_present_model(storage: Path, photos: Path):
    with on_mini(storage, photos) as run:
        before = evaluation.read(run)
        teach(run, 2)
        do(run, ["evaluate"])
        after = evaluation.read(run)
        assert run.workspace.manifest("output-images")["inputs"]["model"] == drawing_digest(run.workspace, "fine-tuned-model")
    assert all(before[name].value != after[name].value for name in ("dino", "clip_t", "pres"))


def test_what_was_drawn_since_is_not_shown_beside_what_the_base_has_not_drawn(storage: Path, photos: Path):
    with on_mini(storage, photos) as run:
        evaluation.before_after(run)
    with on_mini(storage, photos, "generate.prompts=['photo of {subject} in a room']") as run:
        do(run, ["generate"])
        with pytest.raises(RayboothError, match=r"has not drawn what .* holds in output-images: run 'raybooth evaluate"):
            evaluation.before_after(run)


def test_other_texts_are_other_scores(storage: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    """As when a later version asks CLIP otherwise."""
    with on_mini(storage, photos) as run:
        before = evaluation.read(run)["clip_t"]
        monkeypatch.setattr(Config, "without_token", lambda self, prompt: "a car on the water")
        do(run, ["evaluate"])
        assert evaluation.read(run)["clip_t"].value != before.value


def test_a_run_without_a_model_is_told_before_anything_is_fetched_or_drawn(storage: Path, photos: Path):
    shutil.rmtree(storage / "fine-tuned-model")
    shutil.rmtree(storage / "encoders")
    with on_mini(storage, photos) as run, pytest.raises(RayboothError, match="no complete fine-tuned-model"):
        do(run, ["evaluate"])
    assert not (storage / "encoders").exists()


def test_one_picture_of_a_prompt_is_told_to_say_nothing_of_variety(storage: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    with on_mini(storage, photos, "generate.images_per_prompt=1") as run:
        run.quiet = False
        do(run, ["evaluate"])
        assert "div" not in evaluation.read(run)
    assert evaluation.ALONE in capsys.readouterr().err


def test_crops_and_mirror_images_are_no_photographs(storage: Path, photos: Path):
    with on_mini(storage, photos, "subject.crops=1", "subject.flip=true") as run:
        do(run, ["prepare", "evaluate"])
        assert len(run.facts("instance-images")["pictures"]) == 3 * 4
        own = pairwise_cosines(vit(FOLDER / "vit")([Image.open(storage / "instance-images" / f"0{i}.png") for i in range(3)])["dino"].numpy()).mean()
        assert evaluation.read(run)["dino"].ceiling == pytest.approx(own, abs=1e-5)
        [candidate] = selection.candidates(run, {1: "fine-tuned-model"})
        assert candidate.own == pytest.approx(own, abs=1e-5)


def test_one_pair_of_pictures_has_a_dash_for_its_interval(storage: Path, photos: Path):
    with on_mini(storage, photos) as run:
        [line] = [line for line in evaluation.table(run).splitlines() if line.startswith("DIV     pictures of one prompt")]
        assert re.fullmatch(r"DIV .* +\d\.\d{3} +-  .*", line)


def test_the_stage_scores_a_run_and_does_nothing_twice(storage: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    with on_mini(storage, photos, "prior.images=4", "generate.images_per_prompt=3") as run:
        run.quiet = False
        do(run, ["generate", "evaluate"])
        scores = evaluation.read(run)
        assert set(scores) == {"dino", "clip_i", "clip_t", "pres", "div", "class_div"}
        for name, score in scores.items():
            assert isinstance(score, Score)
            assert score.low is not None
            assert score.high is not None
            assert score.low <= score.value <= score.high, name
        features = evaluation.measured(run)
        assert scores["dino"].value == pytest.approx(to_subject(features["output"]["dino"], features["instance"]["dino"]).mean(), abs=1e-6)
        assert scores["dino"].ceiling == pytest.approx(pairwise_cosines(features["instance"]["dino"]).mean(), abs=1e-6)
        assert scores["pres"].floor == pytest.approx(to_subject(features["class-before"]["dino"], features["instance"]["dino"]).mean(), abs=1e-6)
        before = {p: p.stat().st_mtime_ns for p in storage.rglob("*.safetensors")} | {p: p.stat().st_mtime_ns for p in storage.rglob("*.png")}
        evaluation.evaluate(run)
        assert {p: p.stat().st_mtime_ns for p in before} == before
    assert "DINO    looks like the subject" in capsys.readouterr().err


def test_the_ceiling_of_the_prompt_is_what_the_base_model_draws_of_it_in_words_that_it_knows(storage: Path, photos: Path):
    """Asked for a word that it has never met, it is easily beaten."""
    prompts = ["photo of {subject} in the snow", "photo of a dog in the snow", "photo of a car"]
    with on_mini(storage, photos, f"generate.prompts={prompts}") as run:
        do(run, ["evaluate"])
        drawn = run.workspace.manifest("plain-images")["facts"]["rows"]
        assert [(r["prompt"], r["seed"]) for r in drawn.values()] == [
            (prompt, picture_seed(run, "output", k)) for prompt in ("photo of a dog in the snow", "photo of a car") for k in range(2)
        ], "two of the prompts are the same in plain words"
        images = [Image.open(storage / "plain-images" / name) for name in (*list(drawn)[:2], *drawn)]
        pictures, words = clip(FOLDER / "clip")
        asked = ["photo of a dog in the snow"] * 4 + ["photo of a car"] * 2
        expected = to_prompt(pictures(images)["clip"].numpy(), words(asked)["clip"].numpy()).mean()
        assert evaluation.read(run)["clip_t"].ceiling == pytest.approx(expected, abs=1e-6)


def test_a_change_is_seen_that_two_intervals_hide():
    """Pictures of the same seeds vary together; what has changed of each does not."""
    rng = np.random.default_rng(2)
    base = rng.normal(0.2, 0.2, 24).astype(np.float32)
    score = scored(base + 0.05 + rng.normal(0, 0.02, 24).astype(np.float32), base)
    assert score.low is not None
    assert score.changed is not None
    assert score.low < base.mean(), "by its own interval it may be what it was"
    assert 0.03 < score.changed[0] < 0.05 < score.changed[1] < 0.07
    points = rng.normal(size=(24, 1, 8))
    nearer = np.stack([distances((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)) for x in (points, points + 0.3)])
    pairs = scored_pairs(nearer[1], nearer[0])
    assert pairs.changed is not None
    assert pairs.changed[0] < pairs.value - nearer[0].sum() / (24 * 23) < pairs.changed[1] < 0
    assert pairs.low is not None
    assert pairs.high is not None
    assert pairs.changed[1] - pairs.changed[0] < pairs.high - pairs.low
