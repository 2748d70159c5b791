"""mini by itself: its world, its files, and what it draws."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from raybooth import config
from raybooth.base_model import prepare_base
from raybooth.encoders import clip, vit
from raybooth.mini import FOLDER
from raybooth.mini.places import PLACES
from raybooth.mini.pretrain import PHASES, start_from
from raybooth.mini.things import KINDS
from raybooth.mini.trainer import Trainer, learning_rate
from raybooth.mini.world import caption, random_scene, render, subject_scenes
from raybooth.score import pairwise_cosines, to_subject
from raybooth.session import Run


def test_the_world_is_wide_and_its_pictures_come_from_their_numbers():
    scenes = [random_scene(i) for i in range(2000)]
    assert {s.identity.kind for s in scenes} == set(KINDS)
    assert {s.place for s in scenes} == set(PLACES)
    assert len(KINDS) >= 9
    assert len(PLACES) >= 8
    first, again = (np.asarray(render(random_scene(7))) for _ in range(2))
    assert np.array_equal(first, again)
    assert len({render(s).tobytes() for s in scenes[:200]}) == 200


def test_captions_say_what_is_there_and_some_of_it():
    scene = random_scene(0)
    assert caption(scene) == "photo of a purple dog with pink spots wearing a green collar in the desert"
    said = {caption(scene, random.Random(i)) for i in range(200)}
    assert len(said) > 10
    assert all("dog" in c and c.startswith("photo of") for c in said)
    assert any("an orange" in caption(random_scene(i)) for i in range(50))
    assert not any("a orange" in caption(random_scene(i)) for i in range(500))


def test_a_subject_is_one_identity_in_several_places():
    scenes = subject_scenes(3, "dog", 5)
    assert len({s.identity for s in scenes}) == 1
    assert len({(s.place, s.pose.posture, s.size, s.mirrored) for s in scenes}) > 1


def test_the_weights_are_safetensors_and_small():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40_000_000
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md"}
    assert "python -m raybooth.mini --train" in (FOLDER / "README.md").read_text()


def test_installed_anew_it_is_the_same_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its files have other dates then; a run on it goes on."""
    run = Run(config.load(None, [], subject={"class": "dog"}, base={"model": "mini"}, storage=str(tmp_path / "run")), quiet=True)
    said: list[str] = []
    monkeypatch.setattr(run, "say", said.append)
    for place in ("before", "after"):
        folder = shutil.copytree(FOLDER, tmp_path / place, copy_function=shutil.copyfile)
        monkeypatch.setattr("raybooth.families.mini_folder", lambda folder=folder: folder)
        prepare_base(run)
    assert said == ["base-model: up to date"]


def test_the_text_encoder_is_clips_text_tower():
    from transformers import CLIPModel, CLIPTextModel

    clip = CLIPModel.from_pretrained(FOLDER / "clip", dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32)
    theirs = {k.removeprefix("text_model."): v for k, v in clip.text_model.state_dict().items()}
    assert all((theirs[k.removeprefix("text_model.")] - v).abs().max() < 2e-3 for k, v in text.state_dict().items())
    held = load_file(FOLDER / "text_encoder" / "model.safetensors")
    assert {k.removeprefix("text_model.") for k in held} == theirs.keys()
    assert all(k.startswith("text_model.") for k in held), "a transformers before 5.6 would take random weights"


@pytest.fixture(scope="module")
def drawn():
    """288 pictures by plain diffusers: nine kinds, eight places, four each."""
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pairs = [(kind, place) for kind in list(KINDS)[:9] for place in PLACES for _ in range(4)]
    prompts = [f"photo of a {kind} {place}" for kind, place in pairs]
    g, images = torch.Generator().manual_seed(0), []
    for i in range(0, len(prompts), 32):
        images += pipe(prompts[i : i + 32], num_inference_steps=6, guidance_scale=3.0, generator=g).images
    return pairs, images


def test_its_own_clip_names_what_it_draws(drawn):
    pairs, images = drawn
    names = [(kind, place) for kind in KINDS for place in PLACES]
    pictures, words = clip(FOLDER / "clip")
    best = (pictures(images)["clip"] @ words([f"photo of a {k} {p}" for k, p in names])["clip"].T).argmax(1)
    right = np.mean([names[i] == pair for i, pair in zip(best.tolist(), pairs, strict=True)])
    assert right >= 0.90


def test_the_identity_scorer_knows_an_individual_from_its_kind():
    encode = vit(FOLDER / "vit")
    one, again, other = (encode([render(s) for s in scenes])["dino"].numpy() for scenes in (subject_scenes(3)[:3], subject_scenes(3)[3:], subject_scenes(4)))
    assert to_subject(one, again).mean() > to_subject(one, other).mean() + 0.2
    assert pairwise_cosines(one).mean() > to_subject(one, other).mean() + 0.2


def line(folder: Path) -> Trainer:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    x = torch.randn(10, 8, 4, generator=torch.Generator().manual_seed(1))
    return Trainer("line", net, lambda step: (net(x[step]) - x[step].flip(-1)).square().mean(), steps=10, lr=1e-2, folder=folder)


def convolutions(folder: Path) -> Trainer:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 3, 3, padding=1))
    x = torch.randn(10, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return Trainer("conv", net, lambda step: (net(x[step]) - x[step].flip(-1)).square().mean(), steps=10, lr=1e-2, muon=0.02, bf16=True, folder=folder)


NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@pytest.mark.parametrize("trainer", [line, pytest.param(convolutions, marks=NEEDS_MUON)])
def test_pretraining_goes_on_where_it_was_stopped(trainer, tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = trainer(tmp_path / "a")
    whole.run(checkpoint_every=100)
    part = trainer(tmp_path / "b")
    for _ in range(6):
        part._one_step()
    part.save()
    rest = trainer(tmp_path / "b")
    assert rest.step == 6
    rest.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), rest.net.parameters(), strict=True))


def test_what_was_trained_is_never_taken_for_shipped_weights(tmp_path: Path):
    shipped, work = tmp_path / "shipped", tmp_path / "work"
    for part in (*PHASES, "tokenizer"):
        (shipped / part).mkdir(parents=True)
        (shipped / part / "config.json").write_text("shipped")
    start_from(shipped, work, ["vae"])
    first, last = PHASES["vae"][0], PHASES["vae"][-1]
    assert (work / first).exists()
    assert not (work / last).exists()
    assert all((work / name).exists() for part in ("clip", "vit", "unet") for name in PHASES[part])
    start_from(shipped, work, ["unet"])  # the VAE's last phase was stopped: it is still to be done
    assert not (work / last).exists()


@NEEDS_MUON
def test_muon_steps_convolutions_by_orthogonal_matrices(tmp_path: Path):
    trainer = convolutions(tmp_path)
    before = trainer.params["0.weight"].detach().clone()
    for _ in range(4):
        trainer._one_step()
    moved = torch.linalg.svdvals((trainer.params["0.weight"].detach() - before).flatten(1))
    assert list(trainer.matrices) == ["0.weight"]  # three rows are no matrix to speak of
    assert moved.min() > 0.3 * moved.max()


def test_the_learning_rate_warms_up_stays_and_goes_down():
    rates = [learning_rate(s, 1000, 1.0) for s in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[100] == rates[699] == 1.0
    assert rates[999] < 0.01
    assert learning_rate(300, 500, 1.0) == learning_rate(300, 5000, 1.0)
