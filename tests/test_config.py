import json
from pathlib import Path

import pytest

import raybooth
from raybooth import config
from raybooth.config import Config
from raybooth.errors import RayboothError
from raybooth.prompts import filled
from raybooth.sections import Base, Finetune

ROOT = Path(__file__).parents[1]


def test_the_defaults_are_the_notebooks_and_the_example_spells_them_out():
    plain = config.load(None, ["subject.class=dog"])
    spelled = config.load(ROOT / "examples" / "dog.toml")
    assert spelled.base.model == plain.base.model == "CompVis/stable-diffusion-v1-4"
    assert plain.base.pinned_revision == spelled.base.revision == "b95be7d6f134c3a9e62ee616f310733567f069ce"
    assert (plain.finetune.steps, plain.finetune.lr, plain.finetune.max_grad_norm) == (400, 5e-6, 1.0)
    assert (plain.prior.images, plain.prior.weight) == (200, 1.0)
    assert spelled.finetune.model_copy(update={"batch": plain.finetune.batch}) == plain.finetune
    assert spelled.finetune.batch == plain.finetune.batch * spelled.cluster.workers  # the notebook counts rows a worker
    assert spelled.subject.photos == ["hf://diffusers/dog-example"]
    assert (spelled.cluster.workers, spelled.cluster.gpus_per_worker) == (2, 1)


def test_every_example_is_valid():
    for path in (ROOT / "examples").glob("*.toml"):
        assert config.load(path, ["subject.class=dog"]).subject.class_name


def test_mini_brings_its_own_defaults_and_the_user_has_the_last_word():
    mini = config.load(None, ["subject.class=dog", "base.model=mini", "finetune.steps=7"])
    assert mini.finetune.lr == config.MINI_DEFAULTS["finetune"]["lr"]
    assert mini.finetune.steps == 7
    assert Config(subject={"class": "dog"}, base=Base(model="mini")).prior.images == config.MINI_DEFAULTS["prior"]["images"]


def test_layers_file_then_values_then_set(tmp_path: Path):
    path = tmp_path / "my.toml"
    path.write_text('seed = 3\n[subject]\nclass = "cat"\ntoken = "zwx"\n[finetune]\nsteps = 10\nbatch = 6\n')
    made = config.load(path, ["finetune.steps=30"], subject={"class": "dog"})
    assert (made.seed, made.subject.class_name, made.subject.token, made.finetune.steps, made.finetune.batch) == (3, "dog", "zwx", 30, 6)


def test_a_file_that_windows_wrote_is_read(tmp_path: Path):
    path = tmp_path / "my.toml"
    path.write_bytes('\ufeffseed = 3\r\n[subject]\r\nclass = "cat"\r\n'.encode())
    made = config.load(path)
    assert (made.seed, made.subject.class_name) == (3, "cat")


@pytest.mark.parametrize("written", ["1234567", "95e7", "true", "2024-01-01", "0x1f", " 12 "])
def test_what_is_text_stays_as_it_is_written(written: str):
    made = config.load(None, ["subject.class=dog", f"base.revision={written}", f"storage={written}"])
    assert (made.base.revision, made.storage) == (written.strip(), written.strip())


@pytest.mark.parametrize("written", ["2024", "2024-01-01", "true", "inf", "{subject} on the moon", "{class}", "['2024', \"x\"]"])
def test_lists_of_texts_are_texts_too(written: str):
    made = config.load(
        None, ["subject.class=dog", f"subject.photos={written}", f"generate.prompts={written}", "finetune.method=lora", f"lora.targets={written}"]
    )
    assert made.subject.photos == made.generate.prompts == made.lora.targets == (["2024", "x"] if written[0] == "[" else [written])


def test_a_date_is_shown_as_people_write_it():
    with pytest.raises(RayboothError, match=r"finetune\.steps = 2024-05-01 is not possible"):
        config.load(None, ["subject.class=dog", "finetune.steps=2024-05-01"])


def test_an_elastic_group_grows_as_far_as_rows_go():
    made = config.load(None, ["subject.class=dog", "cluster.workers=1-4"])
    assert (made.finetune.batch, made.workers) == (2, (1, 2))
    assert config.load(None, ["subject.class=dog", "cluster.workers=1-4", "finetune.batch=8"]).workers == (1, 4)


def test_a_kept_configuration_is_of_the_storage_that_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Relative, absolute or moved; what lies behind a URI has its copy here."""
    (tmp_path / "moved").mkdir()
    kept = tmp_path / "moved" / "config.json"
    monkeypatch.chdir(tmp_path)
    for storage in ("run", "/elsewhere/run"):
        kept.write_text(Config(subject={"class": "dog"}, storage=storage).model_dump_json(by_alias=True))
        assert config.load(Path("moved/config.json")).storage == str(tmp_path / "moved")
        assert config.load(kept, storage="other").storage == "other"
    kept.write_text(Config(subject={"class": "dog"}, storage="s3://bucket/run").model_dump_json(by_alias=True))
    assert config.load(kept).storage == "s3://bucket/run"


def test_a_saved_configuration_reads_back_the_same():
    made = config.load(None, ["subject.class=dog", "base.model=mini", "generate.images_per_prompt=2"])
    assert Config(**made.model_dump(by_alias=True, mode="json")) == made


def test_defaults_of_mini_stay_with_mini(tmp_path: Path):
    """A storage keeps every setting; only what was chosen goes along to another base."""
    kept = tmp_path / "config.json"
    mini = config.load(None, ["subject.class=dog", "base.model=mini", "finetune.steps=7", "prior.guidance=2"], storage=str(tmp_path))
    kept.write_text(mini.model_dump_json(by_alias=True))
    other = config.load(kept, base={"model": "owner/model"})
    assert other.finetune == Config(subject={"class": "dog"}).finetune.model_copy(update={"steps": 7})
    assert (other.subject.class_name, other.prior.guidance, other.prior.weight, other.evaluate) == ("dog", 2, 1, Config(subject={"class": "dog"}).evaluate)
    kept.write_text(other.model_dump_json(by_alias=True))
    assert config.load(kept, ["base.model=mini", "prior.guidance=2"]) == mini
    assert config.load(kept, base={"model": "owner/another"}).finetune == other.finetune


def test_paths_of_python_are_paths():
    made = Config(subject={"class": "dog", "photos": [Path("a"), "b"]}, base={"model": Path("/models/a")}, storage=Path("/runs/a"))
    assert (made.subject.photos, made.base.model, made.storage) == (["a", "b"], "/models/a", "/runs/a")


@pytest.mark.parametrize("base", ["CompVis/stable-diffusion-v1-4", "mini"])
def test_prodigys_rate_is_a_factor_near_one_unless_the_user_sets_it(base: str):
    plain = config.load(None, ["subject.class=dog", "finetune.optimizer=prodigy"], base={"model": base})
    assert (plain.finetune.lr, plain.finetune.text_encoder_lr, plain.finetune.steps) == (1.0, None, 400)
    assert plain == Config(subject={"class": "dog"}, base={"model": base}, finetune=Finetune(optimizer="prodigy"))
    assert Config(**plain.model_dump(by_alias=True, mode="json")) == plain
    set_by_user = config.load(None, ["subject.class=dog", "finetune.optimizer=prodigy", "finetune.lr=0.5"], base={"model": base})
    assert set_by_user.finetune.lr == 0.5
    assert Config(**set_by_user.model_dump(by_alias=True, mode="json")) == set_by_user


@pytest.mark.parametrize(("method", "times"), [("full", 40), ("lora", 500)])
@pytest.mark.parametrize("base", ["CompVis/stable-diffusion-v1-4", "mini"])
def test_adafactors_rate_is_relative_to_the_size_of_weights_unless_the_user_sets_it(base: str, method: str, times: float):
    def of(*how: str) -> Finetune:
        return config.load(None, ["subject.class=dog", f"finetune.method={method}", *how], base={"model": base}).finetune

    usual, own = of(), of("finetune.optimizer=adafactor")
    assert own.lr == pytest.approx(times * usual.lr)
    assert own.text_encoder_lr == (None if usual.text_encoder_lr is None else times * usual.text_encoder_lr)
    assert of("finetune.optimizer=adafactor", "finetune.lr=0.5").lr == 0.5


def test_adapters_have_a_rate_of_their_own_unless_the_user_sets_it(tmp_path: Path):
    """They start from nothing, and learn next to nothing at that of the weights."""

    def rate(*how: str, path: Path | None = None) -> float:
        return config.load(path, ["subject.class=dog", *how]).finetune.lr

    assert rate("finetune.method=lora") == 1e-4 > rate()
    assert rate("finetune.method=lora", "finetune.lr=5e-5") == 5e-5
    assert rate("finetune.method=lora", "finetune.optimizer=prodigy") == 1
    assert rate("finetune.method=lora", "base.model=mini") == rate("base.model=mini"), "mini's own serves for both"
    for section in (Finetune(steps=3), Finetune(method="lora"), Finetune(optimizer="adafactor")):
        by_name = config.load(None, ["subject.class=dog"], base={"model": "mini"}, finetune=section.model_dump(include=section.model_fields_set))
        assert Config(subject={"class": "dog"}, base={"model": "mini"}, finetune=section).finetune == by_name.finetune, "mini's own, in Python too"
        again = Config(subject={"class": "dog"}, finetune=section).finetune
        assert again == Config(subject={"class": "dog"}, finetune=again).finetune == Finetune(**section.model_dump(include=section.model_fields_set))
    kept = tmp_path / "config.json"
    kept.write_text(config.load(None, ["subject.class=dog"]).model_dump_json(by_alias=True))
    assert rate("finetune.method=lora", path=kept) == 1e-4


@pytest.mark.parametrize("base", ["CompVis/stable-diffusion-v1-4", "mini"])
def test_a_kept_configuration_takes_another_optimizers_rates(tmp_path: Path, base: str):
    """A storage keeps every setting, the defaults too: prodigy's factor is not adamw's rate, nor the other way round."""
    kept, plain = tmp_path / "config.json", config.load(None, ["subject.class=dog"], base={"model": base}, storage=str(tmp_path))
    kept.write_text(plain.model_dump_json(by_alias=True))
    prodigy = config.load(kept, ["finetune.optimizer=prodigy"])
    assert prodigy == config.load(None, ["subject.class=dog", "finetune.optimizer=prodigy"], base={"model": base}, storage=str(tmp_path))
    kept.write_text(prodigy.model_dump_json(by_alias=True))
    assert config.load(kept, ["finetune.optimizer=adamw"]) == plain
    adafactor = ["finetune.optimizer=adafactor", "finetune.method=lora"]
    assert config.load(kept, adafactor) == config.load(None, ["subject.class=dog", *adafactor], base={"model": base}, storage=str(tmp_path))
    assert config.load(kept, ["finetune.steps=7"]).finetune.lr == 1
    kept.write_text(config.load(None, ["finetune.lr=3e-4"], base={"model": base}, subject={"class": "dog"}).model_dump_json(by_alias=True))
    assert config.load(kept, ["finetune.optimizer=prodigy"]).finetune.lr == 3e-4  # what somebody has set stays


@pytest.mark.parametrize(
    ("key", "meant"),
    [("finetune.stepz", "finetune.steps"), ("steps", "prior.steps or finetune.steps or generate.steps"), ("subject.klass", "subject.class"),
     ("cluster.worker", "cluster.workers"), ("storag", "storage"), ("fintune.lr", "finetune.lr"),
     ("genrate.prompts", "generate.prompts"), ("Finetune.steps", "finetune.steps"), ("lrr", "finetune.lr"),
     ("step", "finetune.steps|prior.steps|generate.steps")],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_known_one(key: str, meant: str):
    with pytest.raises(RayboothError) as caught:
        config.load(None, ["subject.class=dog", f"{key}=1"])
    assert any(f"did you mean {m}?" in str(caught.value) for m in meant.split("|"))


def test_prompts_are_filled_in():
    made = config.load(None, ["subject.class=dog", "subject.token=zwx"])
    assert made.fill("{subject} / {token} / {class}") == "zwx dog / zwx / dog"
    assert made.fill("{{subject}} {red} {subject.upper} {token:>9} {} {") == "{zwx dog} {red} {subject.upper} {token:>9} {} {"
    assert filled("a {subject}", "zwx", "{token}") == "a zwx {token}"
    assert made.class_prompt == "photo of a dog"
    assert made.subject.prompt == "photo of zwx dog"


@pytest.mark.parametrize(("noun", "named"), [("owl", "an owl"), ("unicorn", "a unicorn"), ("hourglass", "an hourglass"), ("teapot", "a teapot")])
def test_a_class_has_the_article_that_it_takes(noun: str, named: str):
    made = config.load(None, [f"subject.class={noun}"])
    assert made.class_prompt == f"photo of {named}"
    assert made.fill("A {class}, no banana {class}") == f"{named.capitalize()}, no banana {noun}"
    assert made.fill("an {class}") == named


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["finetune.optimizer=prodigy", "finetune.lr=1", "finetune.text_encoder_lr=1e-4"], "one learning rate for all"),
        (["finetune.optimizer=adafactor", "finetune.method=lora", "lora.dora=true"], "does not go with lora.dora"),
        (["lora.rank=64"], "lora.rank is for finetune.method = 'lora', and this run trains the weights themselves"),
        (["finetune.optimizer=adafactor", "finetune.precision=bf16-weights"], "goes with finetune.optimizer = 'adamw'"),
        (["finetune.optimizer=adamw8bit", "finetune.channels_last=true"], "lays weights out anew"),
        (["cluster.gpus_per_worker=0.5", "cluster.workers=2"], "each needs whole GPUs"),
        (["cluster.gpus_per_worker=1.5"], "each needs whole GPUs"),
        (["finetune.method=lora", "finetune.compile=true", "lora.dropout=0.1"], "does not go with lora.dropout"),
        *(
            ([f"generate.prompts=['a {word} dog']"], "has a placeholder that is not known")
            for word in ("{subject[a]}", "{subject.upper}", "{token:>9}", "{red}")
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_at_once(settings: list[str], told: str):
    with pytest.raises(RayboothError, match=told):
        config.load(None, ["subject.class=dog", *settings])


def test_a_section_on_top_of_one_that_is_none_does_not_hide_it(tmp_path: Path):
    path = tmp_path / "my.toml"
    path.write_text('subject = "dog"\n')
    with pytest.raises(RayboothError, match="subject = 'dog' is not possible"):
        config.load(path, subject={"class": "dog"})
    with pytest.raises(RayboothError, match="finetune = 3 is not possible"):
        config.load(None, ["finetune=3", "finetune.steps=3"], subject={"class": "dog"})


def test_a_section_in_python_is_no_word():
    with pytest.raises(RayboothError, match=r"base = 'mini' is not possible: it is a section of settings such as base\.model"):
        config.Config(subject={"class": "dog"}, base="mini")  # type: ignore[arg-type]


def test_switches_stay_switches():
    assert config.load(None, ["subject.class=dog", "subject.flip=true", "finetune.text_encoder=false"]).subject.flip


def test_in_python_a_run_is_named_by_its_settings_its_file_or_its_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("raybooth.verbs.do", lambda run, names: None)
    storage, file = tmp_path / "run", tmp_path / "dog.toml"
    file.write_text(f'storage = "{storage}"\n[subject]\nphotos = ["."]\nclass = "dog"\n')
    config = raybooth.run(file).config
    assert config.storage == str(storage)
    assert raybooth.evaluate(str(file)).config == raybooth.generate(config).config == config
    with pytest.raises(RayboothError, match=f"There is no run in {storage}"):
        raybooth.generate(storage)
    (storage / "config.json").write_text(json.dumps(config.model_dump(by_alias=True, mode="json")))
    moved = storage.rename(tmp_path / "moved")
    assert raybooth.generate(moved).config == config.model_copy(update={"storage": str(moved)})
    with pytest.raises(RayboothError, match=r"There is no configuration file .*cat\.toml"):
        raybooth.run(tmp_path / "cat.toml")


def test_no_bound_is_hidden_by_a_wider_one():
    """Pydantic goes by the last of several on one field."""
    for name, section in Config.model_fields.items():
        for key, field in getattr(section.annotation, "model_fields", {}).items():
            marks = [type(mark).__name__ for mark in field.metadata]
            assert len(marks) == len(set(marks)), f"{name}.{key}"
    for setting in ("lora.rank=4097", "generate.images_per_prompt=100001", "cluster.sample_batch=257"):
        with pytest.raises(RayboothError, match=f"{setting.partition('=')[0]} = "):
            config.load(None, ["subject.class=dog", "finetune.method=lora", setting])
