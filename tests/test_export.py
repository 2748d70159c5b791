"""Every export opens in what reads it, and draws there what raybooth draws."""

import ast
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import diffusers
import pytest
import torch
from finished import CLOSE, apart, fine_tuned, opened, ours, run_of, theirs
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from toys import MAKERS

import raybooth
from raybooth import card
from raybooth.base_model import prepare_base
from raybooth.cli import main
from raybooth.config import load as load_config
from raybooth.drawing import output_rows
from raybooth.errors import RayboothError
from raybooth.families import family_of
from raybooth.families.extract import extract
from raybooth.families.lora import WEIGHTS
from raybooth.families.original import original_unet
from raybooth.families.parts import load
from raybooth.jobs import drawing_digest
from raybooth.pictures import png
from raybooth.score import Score
from raybooth.sections import Lora
from raybooth.session import Run

FILE = "unqtkn-dog.safetensors"
UNETS = ["sd1", "sd2", "sdxl"]
LORA, DORA = Lora(rank=4, alpha=2.0), Lora(rank=2, dora=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of a family, made once."""
    made: dict[str, Path] = {}

    def get(name: str, how: Lora | None = None) -> Path:
        key = f"{name} {how}"
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            made[key] = fine_tuned(folder / "run", MAKERS[name](folder / "base"), how)
        return made[key]

    return get


def exported(storage: Path, to: str, output: Path, **how: Any) -> Path:
    return Path(raybooth.export(storage, to, str(output), **how))


@pytest.mark.parametrize(("name", "how"), [*((n, None) for n in MAKERS), *((n, LORA) for n in MAKERS), ("sd1", DORA)])
def test_a_diffusers_folder_opens_and_draws_the_same(runs: Callable[..., Path], tmp_path: Path, name: str, how: Lora | None):
    """Of a LoRA run the adapters are in the weights; and the LoRA by itself draws the same on the base."""
    storage = runs(name, how)
    base, drawn = storage / "base-model", ours(storage)
    assert apart(drawn, theirs(opened(exported(storage, "diffusers", tmp_path / "out")), base)) <= CLOSE
    pipe = opened(base)
    assert apart(drawn, theirs(pipe, base)) > 5 * CLOSE  # it learnt something
    if how:
        pipe.load_lora_weights(exported(storage, "lora", tmp_path / "lora"))
        assert apart(drawn, theirs(pipe, base)) <= CLOSE


@pytest.mark.parametrize(("name", "how"), [*((n, LORA) for n in UNETS), ("sd1", DORA)])
def test_a_lora_opens_in_kohyas_layout(runs: Callable[..., Path], tmp_path: Path, name: str, how: Lora):
    """DoRA has no place in it: what it learnt is extracted."""
    storage = runs(name, how)
    pipe = opened(storage / "base-model")
    pipe.load_lora_weights(exported(storage, "kohya", tmp_path / "out"), weight_name=FILE)
    assert apart(ours(storage), theirs(pipe, storage / "base-model")) <= CLOSE


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_clips_layers_are_called_as_older_readers_look_for_them(runs: Callable[..., Path], tmp_path: Path, name: str):
    """transformers had them so before 5.6; what it does not find it leaves at random, or out."""
    storage = runs(name, LORA)
    learnt = [k.removeprefix("text_encoder.") for k in load_file(storage / "fine-tuned-model" / WEIGHTS) if k.startswith("text_encoder.")]
    whole = load_file(exported(storage, "diffusers", tmp_path / "out") / "text_encoder" / "model.safetensors")
    for names in (learnt, whole):
        assert names
        assert all(k.startswith("text_model.") for k in names)


def test_the_header_of_adapters_says_what_is_not_pefts_default_and_no_more(runs: Callable[..., Path]):
    """diffusers hands all of it to PEFT, and an older one refuses what it does not know. diffusers 0.36 fails without `rank_pattern`."""
    for how, more in ((LORA, set[str]()), (DORA, {"use_dora"})):
        with safe_open(runs("sd1", how) / "fine-tuned-model" / WEIGHTS, "pt") as held:
            header = json.loads(held.metadata()["lora_adapter_metadata"])
        assert {k.removeprefix("unet.") for k in header if k.startswith("unet.")} == {"r", "lora_alpha", "target_modules", "rank_pattern"} | more
        assert header["unet.r"] == how.rank


def test_one_file_of_an_xl_that_predicts_a_velocity_is_marked_and_read_back_as_such(tmp_path: Path):
    """ComfyUI goes by the marks alone, and no configuration of an XL says it."""
    plain = MAKERS["sdxl"](tmp_path / "plain")
    base = Path(shutil.copytree(plain, tmp_path / "base"))
    scheduler = base / "scheduler" / "scheduler_config.json"
    velocity = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | velocity))
    file = exported(fine_tuned(tmp_path / "run", base, None), "single-file", tmp_path / "one") / FILE
    assert {"v_pred", "ztsnr"} <= load_file(file).keys()
    made = load_config(None, [], subject={"class": "dog"}, base={"model": str(file), "configuration": str(plain)}, storage=str(tmp_path / "again"))
    with Run(made, quiet=True) as run:
        prepare_base(run)
    held = json.loads((tmp_path / "again" / "base-model" / "scheduler" / "scheduler_config.json").read_text())
    assert {k: held[k] for k in velocity} == velocity


def by_sd_scripts(folder: Path) -> set[str]:
    """The names that sd-scripts gives to all it can adapt: blocks by their classes, dots to underscores; text encoders as transformers 4 called them."""
    pipe, names = opened(folder), set()
    two = hasattr(pipe, "text_encoder_2")
    wanted = {
        "lora_unet": (pipe.unet, ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")),
        "lora_te1" if two else "lora_te": (pipe.text_encoder, ("CLIPAttention", "CLIPMLP")),
        **({"lora_te2": (pipe.text_encoder_2, ("CLIPAttention", "CLIPMLP"))} if two else {}),
    }
    for prefix, (module, classes) in wanted.items():
        for name, block in module.named_modules():
            if type(block).__name__ in classes:
                name = name if prefix == "lora_unet" or name.startswith("text_model.") else f"text_model.{name}"
                inner = (n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
                names |= {f"{prefix}.{name}.{n}".replace(".", "_") for n in inner}
    return names


@pytest.mark.parametrize("name", UNETS)
def test_an_extracted_lora_in_kohyas_layout_has_the_names_of_sd_scripts_and_draws_as_the_other(runs: Callable[..., Path], tmp_path: Path, name: str):
    storage = runs(name)
    plain, kohya = (exported(storage, to, tmp_path / to, rank=6) for to in ("lora", "kohya"))
    file = kohya / FILE
    tensors = load_file(file)
    layers = {k.partition(".")[0] for k in tensors}
    known = by_sd_scripts(storage / "base-model")
    assert known <= layers
    outer = {"conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2", "label_emb_0_0", "label_emb_0_2"}
    assert {k.removeprefix("lora_unet_") for k in layers - known} <= outer | {"lora_te2_text_projection"}
    for layer in layers:
        down, up, alpha = (tensors[f"{layer}.{k}"] for k in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert down.shape[0] == up.shape[1] == 6
        assert alpha.shape == ()
        assert float(alpha) == 6.0
        assert up.shape[2:] == (1,) * (down.ndim - 2)
    with safe_open(file, "pt") as held:
        header = held.metadata()
    version = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}[name]
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_base_model_version"]) == ("6", "6.0", version)
    assert header["modelspec.trigger_phrase"] == "unqtkn dog"
    pictures = []
    for folder, weights in ((plain, WEIGHTS), (kohya, file.name)):
        pipe = opened(storage / "base-model")
        pipe.load_lora_weights(folder, weight_name=weights)
        pictures.append(theirs(pipe, storage / "base-model"))
    assert apart(*pictures) <= 1e-4


@pytest.mark.parametrize(("name", "how"), [*((n, None) for n in UNETS), ("sd1", DORA)])
def test_one_file_holds_the_weights_to_the_bit(runs: Callable[..., Path], tmp_path: Path, name: str, how: Lora | None):
    storage = runs(name, how)
    base = storage / "base-model"
    folder, whole = exported(storage, "single-file", tmp_path / "one"), exported(storage, "diffusers", tmp_path / "folder")
    kind = getattr(diffusers, family_of(base).pipeline)
    pipe, wanted = kind.from_single_file(str(folder / FILE), config=str(base), local_files_only=True), opened(whole)
    for part in family_of(base).weights:
        read, meant = (getattr(p, part).state_dict() for p in (pipe, wanted))
        assert read.keys() == meant.keys()
        assert all(torch.equal(read[k], meant[k]) for k in meant)
    assert apart(ours(storage), theirs(pipe, base)) <= CLOSE


def test_the_original_names_are_those_of_the_published_code(runs: Callable[..., Path], tmp_path: Path):
    """As another hand has written them down, for the same toy: test_single's tables."""
    from test_single import in_one_file

    storage = runs("sd1")
    written = load_file(exported(storage, "single-file", tmp_path / "one") / FILE)
    wanted = load_file(in_one_file(storage / "fine-tuned-model", tmp_path / "wanted.safetensors"))
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[k], wanted[k]) for k in wanted)


def test_the_upsampler_comes_after_the_attention_if_there_is_one():
    """At the size of Stable Diffusion 1, whose last block but one has none: diffusers reads either place, the published code its own."""
    with torch.device("meta"):
        names = original_unet(diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).state_dict(), 2)
    known = ("output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv", "input_blocks.3.0.op", "output_blocks.11.0.skip_connection")
    assert {f"model.diffusion_model.{k}.weight" for k in known} <= names.keys()
    assert len(names) == 686


def test_mini_goes_everywhere(tmp_path: Path):
    storage = fine_tuned(tmp_path / "run", "mini", only="attn2.to_v")
    base, drawn = storage / "base-model", ours(storage)
    one = exported(storage, "single-file", tmp_path / "one") / FILE
    pipes = {
        "diffusers": opened(exported(storage, "diffusers", tmp_path / "folder")),
        "single-file": diffusers.StableDiffusionPipeline.from_single_file(str(one), config=str(base), local_files_only=True),
    }
    for form, weights in (("lora", WEIGHTS), ("kohya", FILE)):
        pipes[form] = opened(base)  # at full rank the LoRA is the whole difference
        pipes[form].load_lora_weights(exported(storage, form, tmp_path / form, rank=192), weight_name=weights)
    assert apart(drawn, theirs(opened(base), base)) > 5 * CLOSE
    assert {form: d for form, pipe in pipes.items() if (d := apart(drawn, theirs(pipe, base))) > CLOSE} == {}


def test_of_what_fine_tuning_changed_a_lora_keeps_more_the_higher_its_rank(runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """And all at full rank, convolutions too; norms, biases and embeddings are accounted for."""
    storage = runs("sd1")
    family, base = family_of(storage / "base-model"), load(family_of(storage / "base-model"), storage / "base-model", ("unet",)).modules["unet"]
    tuned = load(family, storage / "fine-tuned-model", ("unet",)).modules["unet"]
    kept = []
    for rank in (1, 2, 8, 1000):
        pairs, energy = extract("unet", base, tuned, rank, lambda layers: layers)
        kept.append(energy.kept / energy.layers)
    assert kept == sorted(kept)
    assert kept[0] < 0.7
    assert kept[-1] == pytest.approx(1, abs=1e-5)
    before, after = base.state_dict(), tuned.state_dict()
    for layer, (down, up) in pairs.items():
        update = (up.flatten(1) @ down.flatten(1)).reshape(before[f"{layer}.weight"].shape)
        assert torch.allclose(before[f"{layer}.weight"] + update, after[f"{layer}.weight"], atol=1e-5)
    everything = sum(float((after[k] - before[k]).square().sum()) for k in before)
    assert energy.layers + energy.others == pytest.approx(everything, rel=1e-4)
    assert energy.others > 0
    exported(storage, "lora", tmp_path / "out", rank=2)
    said = capsys.readouterr().err
    assert f"rank 2, unet: {100 * kept[1]:.1f}% of the layers' change kept" in said
    assert "rank 2, all: " in said
    assert "where a LoRA cannot be" in said


def test_again_it_does_nothing_and_what_is_not_its_own_is_safe(runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    storage = runs("sd1", LORA)
    assert Path(raybooth.export(storage, "lora")) == storage / "exports" / "lora"
    before = {p: p.stat().st_mtime_ns for p in (storage / "exports").rglob("*")}
    raybooth.export(storage, "lora")
    assert "up to date" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in (storage / "exports").rglob("*")}
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in (storage / "exports").rglob("*"))  # whoever reads it may be another user
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    for folder in (tmp_path / "mine", storage / "fine-tuned-model"):
        with pytest.raises(RayboothError, match="did not make"):
            exported(storage, "lora", folder)
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    assert ours(storage) is not None  # still whole


def test_a_full_disk_is_said(runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As safetensors says it."""
    full = Mock(side_effect=SafetensorError("I/O error: No space left on device (os error 28)"))
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RayboothError, match=rf"^The folder {tmp_path}/out is full: free some space"):
        exported(runs("sd1"), "single-file", tmp_path / "out")


def test_a_damaged_model_is_not_exported(toy: Path, tmp_path: Path):
    storage = fine_tuned(tmp_path / "run", toy)
    weights = storage / "fine-tuned-model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RayboothError, match=r"fine-tuned-model/unet/.* is not what its manifest says, .* run 'raybooth finetune"):
        exported(storage, "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_card_that_is_no_yaml_has_no_licence(toy: Path, tmp_path: Path):
    """A title with a colon in it, say."""
    base = shutil.copytree(toy, tmp_path / "base")
    (base / "README.md").write_text("---\ntitle: my dog: second try\n---\n")
    with run_of(tmp_path / "run", base) as run:
        prepare_base(run)
        assert run.facts("base-model")["license"] is None


def test_the_card_says_what_it_is(tmp_path: Path):
    storage = fine_tuned(tmp_path / "run", "mini", only="attn2.to_q")
    with run_of(storage, "mini") as run:
        rows, model = output_rows(run), drawing_digest(run.workspace, "fine-tuned-model")
        stage = run.workspace.stage("output-images", {"model": model})
        for row in rows:
            stage.write(row["name"], png(Image.new("RGB", (64, 64))))
        names = [r["name"] for r in rows]
        stage.finish({"pictures": names, "rows": {r["name"]: {"prompt": r["prompt"], "seed": r["seed"]} for r in rows}})
        outputs = run.outputs("output-images")
        drawn = [outputs[n] for n in names]
        stage = run.workspace.stage("scores", {"pictures": {"output": drawn}})
        stage.write("scores.json", json.dumps({"dino": asdict(Score(0.7, 0.6, 0.8, 0.1, 0.9))}).encode())
        stage.finish()
    folder = exported(storage, "kohya", tmp_path / "out", rank=2)
    read = ModelCard.load(folder / "README.md")
    assert read.data.license == "apache-2.0"  # of mini's own card
    assert read.data.instance_prompt == "photo of unqtkn dog"
    assert "lora" in (read.data.tags or [])
    assert [p.name for p in sorted(folder.glob("*.png"))] == ["picture-0.png", "picture-1.png", "picture-2.png"]
    digest = json.loads((storage / "fine-tuned-model" / "manifest.json").read_text())["digest"]
    assert all(text in read.text for text in ("mini", "`unqtkn`", "`dog`", digest, "in the snow", "0.700", "rank 2, unet:", "picture-2.png", FILE))
    assert "# `unqtkn dog`" in read.text
    assert [w["text"] for w in read.data.widget] == [rows[i]["prompt"] for i in (0, 4, 8)]
    config = json.loads((storage / "config.json").read_text())
    config["generate"] |= {"prompts": ["a car"], "images_per_prompt": 1}
    (storage / "config.json").write_text(json.dumps(config))  # it wants to draw something else by now
    exported(storage, "kohya", tmp_path / "out", rank=2)
    assert f"![{rows[4]['prompt']}](picture-1.png)" in (folder / "README.md").read_text()
    weights = next((storage / "fine-tuned-model" / "unet").glob("*.safetensors"))
    save_file({k: v * 1.01 for k, v in load_file(weights).items()}, weights)
    stage = run.workspace.stage("fine-tuned-model", {"toy": "another"})
    shutil.copytree(stage.folder, stage.partial, ignore=shutil.ignore_patterns("manifest.json", ".partial-*"))
    stage.finish()
    exported(storage, "kohya", tmp_path / "out", rank=2)
    assert not list(folder.glob("*.png")), "they are of an earlier model"
    assert "0.700" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("to", ["lora", "kohya", "single-file"])
def test_the_cards_code_can_be_run(runs: Callable[..., Path], to: str):
    """Of a base in one file, and a prompt with quotation marks."""
    storage = runs("sd1", None)
    prompts = ['photo of {subject} with a sign that says "dog"']
    sections: dict[str, Any] = {"base": {"model": "./model.safetensors", "configuration": "../sd1"}, "generate": {"prompts": prompts}}
    made = load_config(storage / "config.json", storage=str(storage), **sections)
    text = card.files(Run(made, quiet=True), to, "unqtkn-dog", [])["README.md"].decode()
    calls = [node for node in ast.walk(ast.parse(text.split("```")[1].removeprefix("python"))) if isinstance(node, ast.Call)]
    [read] = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "from_single_file"]
    assert [ast.literal_eval(keyword.value) for keyword in read.keywords] == ["path/to/sd1"]
    assert ast.literal_eval(read.args[0]) == ("unqtkn-dog.safetensors" if to == "single-file" else "path/to/model.safetensors")
    assert any(ast.literal_eval(a) == made.fill(prompts[0]) for call in calls for a in call.args if isinstance(call.func, ast.Name) and call.func.id == "pipe")


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("sd1", ["--to", "hub"], "needs --repo owner/name"),
        ("sd1", ["--to", "lora", "--repo", "me/dog"], "nothing else is sent"),
        ("sd1", ["--to", "lora", "--rank", "4"], "leave --rank out"),
        ("sd1", ["--to", "diffusers", "--rank", "4"], "nothing else has a rank"),
        ("sd1", ["--to", "hub", "--repo", "me/dog", "--output", "x"], "leaves nothing on this machine"),
        ("sd1", ["--to", "lora", "--output", __file__], "is not a folder"),
        ("sd3", ["--to", "kohya"], "is not written for Stable Diffusion 3"),
        ("flux", ["--to", "single-file"], "is not written for FLUX.1"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(runs: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str, arguments: list[str], named: str):
    assert main(["export", "--storage", str(runs(name, LORA)), *arguments]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "Traceback" not in said


@pytest.mark.parametrize("rank", [0, -3, 2.5])
def test_ranks_that_are_none_are_refused_in_python_too(runs: Callable[..., Path], rank: Any):
    with pytest.raises(RayboothError, match=f"--rank {rank} is none"):
        raybooth.export(runs("sd1"), "lora", rank=rank)
    with pytest.raises(RayboothError, match="keeps its rank"):
        raybooth.export(runs("sd1", DORA), "lora", rank=2)


def test_a_storage_that_cannot_be_written_to_is_exported_elsewhere(runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage, real = runs("sd1", LORA), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and not (Path(path) == storage and mode == os.W_OK))
    monkeypatch.setattr("raybooth.workspace.Workspace.locked", Mock(side_effect=RayboothError("is on a read-only file system")))
    assert Path(raybooth.export(storage, "lora", tmp_path / "out"), WEIGHTS).is_file()
    with pytest.raises(RayboothError, match="read-only"):
        raybooth.export(storage, "lora")


def test_the_licence_of_another_runs_base_goes_along(runs: Callable[..., Path], tmp_path: Path):
    first = runs("sd1") / "base-model"
    manifest = json.loads((first / "manifest.json").read_text())
    copy = Path(shutil.copytree(first, tmp_path / "base-model"))
    (copy / "manifest.json").write_text(json.dumps(manifest | {"facts": manifest["facts"] | {"license": "openrail++"}}))
    with run_of(tmp_path / "run", copy) as run:
        prepare_base(run)
        assert run.facts("base-model")["license"] == "openrail++"


def test_a_link_that_leads_to_itself_is_no_folder(runs: Callable[..., Path], tmp_path: Path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place, said in (("loop", "is a symbolic link that leads to itself"), ("loop/x", "loop is not a folder")):
        with pytest.raises(RayboothError, match=said):
            raybooth.export(runs("sd1", LORA), "lora", str(tmp_path / place))


def test_what_a_run_leaves_is_called_what_it_is(runs: Callable[..., Path]):
    said = [Run(load_config(runs("sd1", how) / "config.json")).model_form for how in (None, LORA)]
    assert said == ["opens in plain diffusers", "adapters for the base model, for load_lora_weights"]


def test_a_run_that_is_not_complete_has_nothing_to_export(tmp_path: Path, toy: Path):
    with run_of(tmp_path / "run", toy) as run:
        prepare_base(run)
        run.save_config()
    with pytest.raises(RayboothError, match="no complete fine-tuned-model"):
        raybooth.export(tmp_path / "run", "lora")


class Api:
    """huggingface_hub's, as far as a push goes."""

    repos: ClassVar[dict[str, dict[str, Any]]] = {}

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
        self.repos.setdefault(repo, {"private": private})
        return f"https://hub.example/{repo}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.repos[repo_id]["files"] = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}


@pytest.mark.parametrize("how", [None, LORA], ids=["full", "lora"])
def test_a_push_is_private_and_holds_the_model_with_its_card(runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, how: Lora | None):
    storage = runs("sd1", how)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RayboothError, match="HF_TOKEN"):
        raybooth.export(storage, "hub", repo="me/dog")
    assert not Api.repos
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_test")
    assert raybooth.export(storage, "hub", repo="me/dog") == "https://hub.example/me/dog"
    pushed = Api.repos.pop("me/dog")
    assert pushed["private"]
    assert '"me/dog"' in pushed["files"]["README.md"].decode()
    wanted = {WEIGHTS} if how else {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"}
    assert wanted <= pushed["files"].keys()
    assert "manifest.json" not in pushed["files"]
    assert not list(storage.glob(".raybooth-scratch-*"))
