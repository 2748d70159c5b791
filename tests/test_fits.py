"""What a model cannot be asked for is refused as soon as its configuration is known: before its weights are fetched or copied, and by `plan`."""

import json
from pathlib import Path

import pytest
from toys import make_flux, make_sd3

from raybooth.cli import main


@pytest.fixture(scope="module", params=[make_flux, make_sd3], ids=["flux", "sd3"])
def flow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the latents of the real ones, an eighth of a picture's side."""
    folder = request.param(tmp_path_factory.mktemp("models") / "flow")
    vae = folder / "vae" / "config.json"
    held = json.loads(vae.read_text())
    four = {k: [held[k][0]] * 4 for k in ("down_block_types", "up_block_types", "block_out_channels")}
    vae.write_text(json.dumps(held | four))
    return folder


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("base.resolution=72", "it must be a multiple of 16, such as 80"),
        ("generate.scheduler=ddim", "generate.scheduler = 'ddim' is not possible with"),
        ("prior.scheduler=pndm", "choose euler or dpmsolver++"),
        ("finetune.min_snr_gamma=5", "is a flow: leave it out"),
        ("finetune.precision=fp16", "overflows in it: take bf16"),
    ],
)
def test_what_a_flow_cannot_do_is_refused_before_any_work(
    setting: str, told: str, flow: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--class=dog", f"--base={flow}", f"--storage={tmp_path}", f"--set={setting}"]
    for verb, more in (("prepare", [f"--photos={photos}"]), ("plan", [])):
        assert main([verb, *more, *arguments]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["generate.scheduler=ddim", "generate.steps=600"], "600 steps of ddim would begin amid the noise"),
        (["prior.scheduler=pndm", "prior.steps=150"], "150 steps of pndm would begin amid the noise"),
    ],
)
def test_steps_that_a_sampler_cannot_take_are_refused_before_any_work(
    settings: list[str], told: str, toy: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--class=dog", f"--base={toy}", f"--storage={tmp_path}", *(f"--set={s}" for s in settings)]
    for verb, more in (("prepare", [f"--photos={photos}"]), ("plan", [])):
        assert main([verb, *more, *arguments]) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_targets_that_take_no_adapter_are_refused_before_any_work(toy: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """And by a run that has its base model already."""
    arguments = ["--class=dog", f"--base={toy}", f"--storage={tmp_path}", "--set=lora.targets=['to_out']"]
    assert main(["prepare", f"--photos={photos}", *arguments[:-1]]) == 0
    for verb, more in (("prepare", [f"--photos={photos}"]), ("plan", [])):
        assert main([verb, *more, *arguments, "--set=finetune.method=lora"]) == 2
        assert "name what is in it, such as to_out.0." in capsys.readouterr().err


def test_class_pictures_that_nobody_draws_need_no_sampler(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["prepare", f"--photos={photos}", "--class=dog", f"--base={make_flux(tmp_path / 'flux')}", f"--storage={tmp_path / 'run'}"]
    assert main([*arguments, "--set=prior.scheduler=ddim", "--set=prior.images=0"]) == 0
    assert main([*arguments, "--set=prior.scheduler=ddim", "--set=prior.images=4"]) == 2
    assert "prior.scheduler = 'ddim'" in capsys.readouterr().err


def test_a_picture_has_no_more_patches_than_there_are_positions(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """32 of 2 x 2 latents of 2 x 2 pixels."""
    folder = make_sd3(tmp_path / "sd3")
    arguments = ["prepare", f"--photos={photos}", "--class=dog", f"--base={folder}", f"--storage={tmp_path / 'run'}", "--set=generate.scheduler=euler"]
    assert main([*arguments, "--set=base.resolution=136"]) == 2
    assert "base.resolution = 136 is not possible" in capsys.readouterr().err
    assert main([*arguments, "--set=base.resolution=128"]) == 0
