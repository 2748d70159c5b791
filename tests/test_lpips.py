"""LPIPS, against numbers of its authors' own package, and as the distance of DIV."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from stored import on_mini, teach

from raybooth import config, evaluation
from raybooth.drawing import by_prompt, photographs
from raybooth.encoder_files import prepare_encoders
from raybooth.errors import RayboothError
from raybooth.lpips import lpips
from raybooth.score import diversity
from raybooth.session import Run
from raybooth.verbs import do

_WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16's convolutions as torch draws them, by torchvision's names."""
    torch.manual_seed(0)
    made, width = tmp_path_factory.mktemp("vgg"), 3
    layers: list[torch.nn.Module] = []
    for w in _WIDTHS:
        if isinstance(w, int):
            layers += [torch.nn.Conv2d(width, w, 3, padding=1), torch.nn.ReLU()]
            width = w
        else:
            layers.append(torch.nn.MaxPool2d(2, 2))
    save_file({f"features.{name}": t for name, t in torch.nn.Sequential(*layers).state_dict().items()}, made / "model.safetensors")
    return made


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Two of noise and a grey one."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)) for _ in range(2)] + [Image.new("RGB", (48, 64), (90, 90, 90))]


def test_it_is_what_its_authors_package_computes(folder: Path, pictures: list[Image.Image]):
    """Of these weights and pictures: lpips 0.1.4, `LPIPS(net="vgg", pnet_rand=True)` with the same VGG16."""
    published = [[0, 0.13504958, 0.15275870], [0.13504958, 0, 0.15382722], [0.15275870, 0.15382722, 0]]
    assert lpips(folder / "model.safetensors")(pictures).numpy() == pytest.approx(np.array(published), abs=1e-6)


def test_larger_pictures_are_compared_at_256_pixels(folder: Path, pictures: list[Image.Image]):
    compare = lpips(folder / "model.safetensors")
    small = [picture.resize((256, 320), Image.Resampling.NEAREST) for picture in pictures[:2]]
    large = [picture.resize((512, 640), Image.Resampling.NEAREST) for picture in small]
    torch.testing.assert_close(compare(large), compare(small))


def run_of(folder: Path, model: Path | str, storage: Path) -> Run:
    loaded = config.load(None, [], subject={"class": "dog"}, base={"model": "mini"}, evaluate={"lpips": str(model)}, storage=str(storage))
    return Run(loaded, quiet=True)


def test_another_network_is_refused(folder: Path, tmp_path: Path):
    other = load_file(folder / "model.safetensors")
    other["features.10.weight"] = other["features.10.weight"][:, :64].contiguous()
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / "model.safetensors")
    with run_of(folder, tmp_path / "other", tmp_path / "run") as run, pytest.raises(RayboothError, match=r"no features\.10\.weight of shape .*must be VGG16"):
        prepare_encoders(run)
    with run_of(folder, "mini", tmp_path / "run") as run, pytest.raises(RayboothError, match="mini has no VGG16"):
        prepare_encoders(run)


def test_diversity_is_by_it_where_it_is_asked_for(folder: Path, tmp_path: Path, photos: Path, in_process: None):
    prompts = "generate.prompts=['photo of {subject} in the snow', 'photo of {subject} at night']"
    with on_mini(tmp_path / "run", photos, prompts, f"evaluate.lpips={folder}") as run:
        do(run, ["prepare", "class-images"])
        teach(run, 1)
        do(run, ["generate", "evaluate"])
        compare, scores = lpips(folder / "model.safetensors"), evaluation.read(run)

        def div(stage: str, groups: list[list[str]]) -> float:
            images = [[Image.open(run.workspace.root / stage / name) for name in names] for names in groups]
            return float(diversity([compare(one).numpy().astype(np.float64) for one in images]).mean())

        of_prompts = list(by_prompt(run, "output-images").values())
        of_class = [run.facts("class-after-images")["pictures"]]
        assert scores["div"].value == pytest.approx(div("output-images", of_prompts), abs=1e-6)
        assert scores["div"].floor == pytest.approx(div("before-images", of_prompts), abs=1e-6)
        assert scores["div"].ceiling == pytest.approx(div("instance-images", [photographs(run)]), abs=1e-6)
        assert scores["class_div"].value == pytest.approx(div("class-after-images", of_class), abs=1e-6)
        assert scores["class_div"].floor == pytest.approx(div(evaluation.class_before(run), of_class), abs=1e-6)
    with on_mini(tmp_path / "run", photos, prompts) as run:
        do(run, ["evaluate"])
        by_patches = evaluation.read(run)
        assert by_patches["dino"] == scores["dino"]
        assert by_patches["div"].value != pytest.approx(scores["div"].value, abs=1e-3)
