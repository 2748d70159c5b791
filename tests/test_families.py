"""Every family at toy size: fit, save, open in plain diffusers, draw; and its parts against diffusers' own."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import toys
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors import safe_open
from toys import LAYOUTS, MAKERS
from transformers import T5EncoderModel

from raybooth.dataset import TrainingSet
from raybooth.errors import RayboothError
from raybooth.families import family_of
from raybooth.families.base import Family, Loaded
from raybooth.families.folder import needed_files, plain_name, settle_shards
from raybooth.families.lora import WEIGHTS, adapters_off, add_adapters, load_adapters, save_adapters
from raybooth.families.parts import encode_image, load, save
from raybooth.finetune_job import training_set
from raybooth.jobs import encoder, prompt_name
from raybooth.noise import Flow, normal
from raybooth.pictures import png
from raybooth.sample import Sampler
from raybooth.sections import Finetune, Generate, Lora, Prior, Sampling
from raybooth.train import Settings, fit

PROMPTS = ["photo of unqtkn dog", "photo of a dog"]
SAMPLING = Sampling(4, 3.0, "euler", 32)


@pytest.fixture(scope="module", params=MAKERS | LAYOUTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return (MAKERS | LAYOUTS)[request.param](tmp_path_factory.mktemp("models") / request.param)


def whole(folder: Path) -> tuple[Family, Loaded]:
    family = family_of(folder)
    return family, load(family, folder, (family.denoiser, "vae", *family.encoders))


def settings(text_encoder: bool, autocast: torch.dtype | None = None, **more: Any) -> Settings:
    how = dict(steps=3, batch=2, lr=0.001, weight_decay=0.0, max_grad_norm=1.0, text_encoder=text_encoder, log_every=1)
    return Settings(Finetune(**how | more), 0, autocast)  # type: ignore[arg-type]


def rows(family: Family, loaded: Loaded, text_encoder: bool, teacher: bool = False, with_class: bool = True) -> TrainingSet:
    """Three of the subject, three of the class."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        mean, std = encode_image(loaded, torch.rand(6, 3, 32, 32, generator=g) * 2 - 1)
        conditioning = family.encode_text(loaded, PROMPTS) if family.has_frozen_encoders(text_encoder) else None
    n = 6 if with_class else 3
    of_class = torch.arange(n) >= 3
    return TrainingSet(mean[:n], std[:n], of_class.int().tolist(), torch.ones(n), PROMPTS, 3, conditioning, teacher)


def draw(family: Family, loaded: Loaded) -> list[np.ndarray]:
    return list(Sampler(family, loaded, SAMPLING, 2).draw(PROMPTS, [1, 2]))


def by_diffusers(folder: Path, family: Family, adapters: Path | None = None) -> np.ndarray:
    """The first picture by the pipeline itself, from the same latents."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if adapters:
        pipe.load_lora_weights(adapters)
    if hasattr(pipe, "unet"):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(diffusers.DDIMScheduler.from_pretrained(folder / "scheduler").config)
    facts = family.facts(folder)
    z = normal(facts.latent_shape(32), 1, "latents")[None]
    how = {}
    if family.pipeline == "FluxPipeline":
        z = pipe._pack_latents(z, *z.shape)
        how = {"max_sequence_length": facts.text_length}  # diffusers leaves it to the caller
    else:
        z = z * getattr(pipe.scheduler, "init_noise_sigma", 1.0) if not hasattr(pipe, "unet") else z
    return pipe(PROMPTS[0], latents=z, num_inference_steps=4, guidance_scale=3.0, height=32, width=32, output_type="np", **how).images[0]


def test_it_draws_what_its_pipeline_draws(model: Path):
    family, loaded = whole(model)
    apart = np.abs(draw(family, loaded)[0] / 255.0 - by_diffusers(model, family)).max()
    assert apart <= 1.1 / 255


def test_guidance_is_by_default_the_pipelines_own(model: Path):
    family = family_of(model)
    call = inspect.signature(getattr(diffusers, family.pipeline).__call__)
    assert family.guidance == call.parameters["guidance_scale"].default
    assert family.sampling(Generate(), 32).guidance == family.guidance
    assert family.sampling(Generate(guidance=0), 32).guidance == 0


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("said", [{}, {"base_shift": 0.2, "max_shift": 3.0}], ids=["as usual", "as it says"])
def test_sigmas_that_are_shifted_with_the_size_are_the_pipelines(name: str, said: dict[str, float], tmp_path: Path):
    """The configuration need not say by how much."""
    folder = MAKERS[name](tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    held = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")}
    path.write_text(json.dumps(held | {"use_dynamic_shifting": True} | said))
    family, loaded = whole(folder)
    apart = np.abs(draw(family, loaded)[0] / 255.0 - by_diffusers(folder, family)).max()
    assert apart <= 1.1 / 255
    assert loaded.objective == Flow(1.0), "trained on noise that is not shifted, as no size is"


@pytest.mark.parametrize("text_encoder", [True, False], ids=["with the text encoders", "denoiser alone"])
def test_fit_save_open_in_plain_diffusers_and_draw(model: Path, tmp_path: Path, text_encoder: bool):
    family, loaded = whole(model)
    before = {k: v.clone() for k, v in loaded.modules[family.denoiser].state_dict().items()}
    steps = list(fit(family, loaded, rows(family, loaded, text_encoder), settings(text_encoder)))
    assert all(s.metrics and np.isfinite(s.metrics.loss) for s in steps)
    assert any(not torch.equal(before[k], v) for k, v in loaded.modules[family.denoiser].state_dict().items())
    save(model, {part: loaded.modules[part] for part in family.trainable(text_encoder)}, tmp_path)
    apart = np.abs(draw(*whole(tmp_path))[0] / 255.0 - by_diffusers(tmp_path, family)).max()
    assert apart <= 1.1 / 255
    assert any((a != b).any() for a, b in zip(draw(*whole(tmp_path)), draw(*whole(model)), strict=True))


@pytest.mark.parametrize("how", [Lora(rank=4), Lora(rank=2, alpha=4.0, dora=True)], ids=["lora", "dora"])
def test_adapters_change_nothing_at_first_and_open_in_plain_diffusers_when_trained(model: Path, tmp_path: Path, how: Lora):
    family, loaded = whole(model)
    plain = draw(family, loaded)
    trained = family.trainable(True)
    add_adapters(family, loaded, trained, how, seed=0)
    assert all((a == b).all() for a, b in zip(plain, draw(family, loaded), strict=True))
    list(fit(family, loaded, rows(family, loaded, True), settings(True, lr=0.05)))
    with adapters_off([loaded.modules[part] for part in trained]):
        assert all((a == b).all() for a, b in zip(plain, draw(family, loaded), strict=True))  # the base has not moved
    learnt = draw(family, loaded)
    assert any((a != b).any() for a, b in zip(plain, learnt, strict=True))
    save_adapters(family, {part: loaded.modules[part] for part in trained}, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "np") as file:
        assert str(model.parent) not in str(file.metadata())
    again = whole(model)
    load_adapters(*again, tmp_path)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(learnt, draw(*again), strict=True)) <= 1
    assert np.abs(learnt[0] / 255.0 - by_diffusers(model, family, tmp_path)).max() <= 1.6 / 255


def test_the_base_models_own_prediction_teaches_the_class(model: Path):
    """Before the adapters have moved, the trained model is its own teacher and class rows cost nothing."""
    family, loaded = whole(model)
    add_adapters(family, loaded, family.trainable(False), Lora(rank=4), seed=0)
    steps = list(fit(family, loaded, rows(family, loaded, False, teacher=True), settings(False, lr=0.05)))
    priors = [s.metrics.prior for s in steps if s.metrics]
    assert priors[0] == pytest.approx(0, abs=1e-10)
    assert priors[-1] > 1e-8


def test_the_targets_are_the_schedulers_own(model: Path):
    objective = family_of(model).objective(model)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g)
    t = torch.cat([objective.draw_t(g) for _ in range(4)])
    if family_of(model).denoiser == "unet":
        reference = DDPMScheduler.from_pretrained(model / "scheduler")
        assert (objective.noisy(x0, noise, t) - reference.add_noise(x0, noise, t)).abs().max() < 1e-6
        velocity = reference.config.prediction_type == "v_prediction"
        target = reference.get_velocity(x0, noise, t) if velocity else noise
    else:
        flow = FlowMatchEulerDiscreteScheduler(shift=1.0)
        t = flow.timesteps[torch.tensor([0, 250, 500, 998])]
        assert (objective.noisy(x0, noise, t) - flow.scale_noise(x0, t, noise)).abs().max() < 1e-6
        target = noise - x0
        # Euler's step of the true velocity, all the way down, is the picture itself.
        assert (objective.noisy(x0, noise, t) - (t / 1000).view(-1, 1, 1, 1) * target - x0).abs().max() < 1e-5
    assert (objective.target(x0, noise, t) - target).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_prompt_of_every_step_is_read_once(name: str):
    folder = toys.made(name)
    family = family_of(folder)
    loaded = load(family, folder, family.encoders)
    afresh = [family.encode_text(replace(loaded, kept={}), [p])["text"] for p in PROMPTS]
    tokenizer, read = loaded.tokenizers["tokenizer"], []

    class Counted:
        model_max_length = tokenizer.model_max_length

        def __call__(self, prompts: list[str], **how: Any) -> Any:
            read.append(prompts)
            return tokenizer(prompts, **how)

    loaded.tokenizers["tokenizer"] = Counted()
    for i in (0, 0, 0, 1, 0):
        assert torch.equal(family.encode_text(loaded, [PROMPTS[i]])["text"], afresh[i])
    assert read == [[PROMPTS[0]], [PROMPTS[1]], [PROMPTS[0]]]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_encoder_that_is_never_trained_runs_once_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """In the stage that encodes, not in the training, which does without it and has the losses of one that runs it at every step."""
    folder, latents = MAKERS[name](tmp_path / "base-model"), tmp_path / "latents"
    encoded: list[int] = []
    forward = T5EncoderModel.forward

    def counted(self: T5EncoderModel, ids: torch.Tensor, *args: Any, **how: Any) -> Any:
        encoded.append(len(ids))
        return forward(self, ids, *args, **how)

    monkeypatch.setattr(T5EncoderModel, "forward", counted)
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    made: dict[str, dict[str, Any]] = {f"{i}.safetensors": {"picture": png(Image.fromarray(pixels))} for i, pixels in enumerate(noise)}
    made |= {prompt_name(p): {"prompt": p} for p in PROMPTS}
    latents.mkdir()
    for file, tensors in zip(made, encoder(str(tmp_path), prompts=True, model="a base model")(list(made.values())), strict=True):
        (latents / file).write_bytes(tensors)
    assert encoded == [1, 1]
    family, names = family_of(folder), list(made)[:3]
    data = training_set(latents, {"instance": names[:2], "class": names[2:]}, dict(zip(("instance", "class"), PROMPTS, strict=True)), Prior(), True)
    light, heavy = load(family, folder, family.trainable(True)), load(family, folder, (family.denoiser, *family.encoders))
    once = [s.metrics.loss for s in fit(family, light, data, settings(True)) if s.metrics]
    assert encoded == [1, 1]
    always = [s.metrics.loss for s in fit(family, heavy, replace(data, conditioning=None), settings(True)) if s.metrics]
    assert encoded == [1, 1, 2, 2, 2]
    assert once == pytest.approx(always, rel=1e-6)


def test_schnell_takes_no_guidance_and_no_second_pass():
    folder = toys.made("schnell")
    family, loaded = whole(folder)
    assert family.facts(folder).embeds_guidance
    assert family.encode_text(loaded, ["photo of a dog"])["text"].shape[1] == family.conditioning(folder)["text"][0] == 256
    low, high = (next(Sampler(family, loaded, Sampling(2, g, "euler", 32), 1).draw(["photo of a dog"], [1])) for g in (0.0, 7.5))
    assert (low == high).all()


def test_adapters_go_where_they_are_asked_to_and_nowhere_is_refused():
    """An encoder without such layers has its own."""
    folder = toys.made("sd1")
    family, loaded = whole(folder)
    add_adapters(family, loaded, family.trainable(True), Lora(rank=2, targets=["to_q"]), seed=0)
    trained = {part: [n for n, _ in loaded.modules[part].named_parameters() if ".lora_A" in n] for part in family.trainable(True)}
    adapted = {part: {n.partition(".lora_A")[0].rpartition(".")[2] for n in names} for part, names in trained.items()}
    assert adapted["unet"] == {"to_q"}
    assert adapted["text_encoder"] == {n.rpartition(".")[2] for n in family.encoder_lora_targets}
    add_adapters(*whole(folder), family.trainable(True), Lora(rank=2, targets=["to_out.0", "conv1"]), seed=0)
    for targets, told in (
        (["nonsense"], "no layer 'nonsense' in what is trained"),
        (["to_k", "to_qq"], "no layer 'to_qq' in what is trained .unet, text_encoder.; did you mean 'to_q'"),
        (["to_k", "conv_shorcut"], "did you mean 'conv_shortcut'"),
        (["fc1"], "has no such layers"),  # but its encoder has
        (["to_q", "to_out"], r"no adapter goes on 'to_out' of .* \(ModuleList\); name what is in it, such as to_out.0.$"),
        (["attn1"], r"'attn1' of .* \(Attention\); name what is in it, such as attn1.to_q, attn1.to_k, attn1.to_v.$"),
        (["norm1"], r"'norm1' of .* \(GroupNorm\); leave it out, or name some such as to_q, to_k, to_v.$"),
        (["to_q", "token_embedding"], r"'token_embedding' of .* \(Embedding\)"),  # diffusers' file has no name for it
        (["to_q", ""], "no layer ''"),
        (["to_q", "fc1"], r"of text_encoder only fc1 would be trained, and diffusers opens no such file; name one of q_proj, .* beside"),
    ):
        with pytest.raises(RayboothError, match=told):
            add_adapters(*whole(folder), family.trainable(True), Lora(rank=2, targets=targets), seed=0)


def test_a_variants_list_of_shards_replaces_none_and_names_what_is_there(tmp_path: Path):
    """Stable Diffusion 3 has both lists beside one another; others the variant's alone."""
    both = ["t5/config.json", "t5/model-00001-of-00002.safetensors", "t5/model.safetensors.index.json",
            "t5/model.fp16-00001-of-00002.safetensors", "t5/model.safetensors.index.fp16.json"]  # fmt: skip
    assert needed_files(both, ["t5"], [], "it") == ["model_index.json", *both[:3]]
    alone = needed_files([n for n in both if "fp16" in n or n.endswith("config.json")], ["t5"], [], "it")
    assert alone == ["model_index.json", "t5/config.json", *both[3:]]
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.fp16-00001-of-00002.safetensors"}}))
    settle_shards(tmp_path, map(plain_name, alone))
    assert json.loads((tmp_path / "t5" / "model.safetensors.index.json").read_text())["weight_map"] == {"a": "model-00001-of-00002.safetensors"}


def edited(name: str, folder: Path, file: str, **values: Any) -> Path:
    base = MAKERS[name](folder)
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | values))
    return base


def test_an_encoder_that_does_not_see_its_padding_is_asked_as_diffusers_asks_it(tmp_path: Path):
    base = edited("sd1", tmp_path / "base", "text_encoder/config.json", use_attention_mask=True)
    family, loaded = whole(base)
    pipe: Any = DiffusionPipeline.from_pretrained(base)
    theirs = pipe.encode_prompt(["a dog"], "cpu", 1, False)[0]
    assert (family.encode_text(loaded, ["a dog"], None)["text"] - theirs).abs().max() < 1e-5
    encoder: Any = loaded.modules["text_encoder"]
    encoder.config.use_attention_mask = False
    assert (family.encode_text(loaded, ["a dog"], None)["text"] - theirs).abs().max() > 1e-2


def test_flux_is_trained_with_a_shift_that_its_scheduler_has_by_itself(tmp_path: Path):
    base = edited("flux", tmp_path / "base", "scheduler/scheduler_config.json", shift=3.0, use_dynamic_shifting=False)
    assert family_of(base).objective(base).shift == 3.0  # type: ignore[union-attr]


def test_a_size_may_be_height_and_width(tmp_path: Path):
    base = edited("sd1", tmp_path / "base", "unet/config.json", sample_size=[16, 16])
    assert family_of(base).facts(base).resolution == 32
