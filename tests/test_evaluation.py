"""The scores against plain transformers, against pictures whose order is known, and as a stage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, ViTModel

from raybooth import config, evaluation
from raybooth.encoders import clip, vit
from raybooth.errors import RayboothError
from raybooth.mini import FOLDER
from raybooth.mini.world import render, subject_scenes
from raybooth.score import Score, among, diversity, scored, to_prompt, to_subject, variety
from raybooth.session import Run
from raybooth.stages import STAGES


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
    assert diversity([same])[0] == pytest.approx(0, abs=1e-6)
    assert 0 < diversity([alike])[0] < diversity([various])[0]
    a, b = torch.from_numpy(various[:1]), torch.from_numpy(various[1:2])
    by_hand = (2 - 2 * torch.cosine_similarity(a, b, dim=-1)).mean()  # the squared distance of unit vectors
    assert diversity([various[:2]])[0] == pytest.approx(float(by_hand), abs=1e-5)
    assert variety(various).mean() == pytest.approx(diversity([various])[0], abs=1e-6)


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400).astype(np.float32)
    score = scored(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (score.low, score.high) == pytest.approx((score.value - half, score.value + half), abs=0.002)
    assert scored(values) == score
    assert len(among(np.eye(4, dtype=np.float32))) == 6


def test_the_stage_scores_a_run_and_does_nothing_twice(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], ray: None):
    made = config.load(
        None,
        ["prior.images=4", "prior.steps=4", "finetune.steps=2", "generate.steps=4", "generate.images_per_prompt=2",
         "generate.prompts=['photo of {subject} in the snow']"],
        subject={"photos": [str(photos)], "class": "dog"}, base={"model": "mini"}, storage=str(tmp_path),
    )  # fmt: skip
    with Run(made) as run:
        for stage in (*STAGES.values(), evaluation.evaluate):
            stage(run)
        scores = evaluation.read(run)
        assert set(scores) == {"dino", "clip_i", "clip_t", "pres", "div", "class_div"}
        for name, score in scores.items():
            assert isinstance(score, Score)
            assert score.low <= score.value <= score.high, name
        features = evaluation.measured(run)
        assert scores["dino"].value == pytest.approx(to_subject(features["output"]["dino"], features["instance"]["dino"]).mean(), abs=1e-6)
        assert scores["dino"].ceiling == pytest.approx(among(features["instance"]["dino"]).mean(), abs=1e-6)
        assert scores["pres"].floor == pytest.approx(to_subject(features["class-before"]["dino"], features["instance"]["dino"]).mean(), abs=1e-6)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} | {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
        evaluation.evaluate(run)
        assert {p: p.stat().st_mtime_ns for p in before} == before
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["clip_t"]["ceiling"] is None
    assert "DINO    looks like the subject" in capsys.readouterr().err


def test_an_encoder_that_changed_in_its_folder_is_taken_anew(tmp_path: Path):
    encoder = tmp_path / "encoder"
    shutil.copytree(FOLDER / "vit", encoder)
    made = config.load(None, [f"evaluate.dino={encoder}"], subject={"class": "dog"}, base={"model": "mini"}, storage=str(tmp_path / "run"))
    with Run(made) as run:
        evaluation.prepare_encoders(run)
        before = run.model_digest("encoders")
        (encoder / "notes.json").write_text("{}")
        evaluation.prepare_encoders(run)
        assert run.model_digest("encoders") != before
        (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
        with pytest.raises(RayboothError, match=r"The encoder .*encoder has no model"):
            evaluation.prepare_encoders(run)
