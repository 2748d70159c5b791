"""The safety checker of a base: found beside it, where it came from, or on the hub; never passed over in silence; and against diffusers' own pipeline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from stored import make_run
from transformers import AutoImageProcessor, CLIPConfig

from raybooth.errors import RayboothError
from raybooth.families.safety import checker
from raybooth.serving.safety import checker_folder
from tests.hub_server import COMMIT, serving


def pictures() -> list[Image.Image]:
    r = np.random.default_rng(0)
    return [Image.fromarray(np.kron(r.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)) for _ in range(9)]


@pytest.fixture(scope="module")
def base(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a checker that has an opinion: half of `pictures` are unsafe to it."""
    folder = tmp_path_factory.mktemp("safe") / "base"
    shutil.copytree(toy, folder)
    torch.manual_seed(0)
    vision: dict[str, Any] = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    model: Any = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config={}, projection_dim=8))
    model.concept_embeds.data = torch.randn(17, 8)
    model.concept_embeds_weights.data = torch.full((17,), 2.0)  # no cosine is larger
    model.special_care_embeds_weights.data = torch.full((3,), 2.0)
    sizes = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **sizes}))
    prepare = AutoImageProcessor.from_pretrained(folder / "feature_extractor", backend="pil")
    with torch.no_grad():
        pixels = prepare(images=pictures(), return_tensors="pt").pixel_values
        likeness = torch.cosine_similarity(model.visual_projection(model.vision_model(pixels)[1]), model.concept_embeds[:1])
    model.concept_embeds_weights.data[0] = likeness.median()  # the first concept is seen in half of them
    model.save_pretrained(folder / "safety_checker")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_its_verdicts_are_those_of_the_pipeline(base: Path):
    images = pictures()
    pipe: Any = StableDiffusionPipeline.from_pretrained(base)
    theirs = [pipe.run_safety_checker(np.asarray(im)[None] / 255.0, "cpu", torch.float32)[1][0] for im in images]
    ours = checker(base, "cpu")(images)
    assert ours == theirs
    assert len(set(ours)) == 2, "the test's pictures are of both kinds"


def test_where_it_is_found(base: Path, toy: Path, tmp_path: Path):
    assert checker_folder(toy) is None
    assert checker_folder(base) == base
    source = tmp_path / "source"
    shutil.copytree(base, source)
    run = make_run(tmp_path / "run", source, 0) / "base-model"
    shutil.rmtree(run / "safety_checker")  # as a run has it, which keeps what it needs
    assert checker_folder(run) == source
    shutil.rmtree(source / "safety_checker")
    with pytest.raises(RayboothError, match="--safety off"):
        checker_folder(run)


def test_it_is_fetched_once_where_the_base_is_of_the_hub(base: Path, tmp_path: Path):
    run = make_run(tmp_path / "run", base, 0) / "base-model"
    shutil.rmtree(run / "safety_checker")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["facts"] = {"source": "me/toy", "commit": COMMIT}
    (run / "manifest.json").write_text(json.dumps(manifest))
    code = f"from pathlib import Path; from raybooth.serving.safety import checker_folder; print(checker_folder(Path({str(run)!r})))"
    with serving() as hub:
        hub.folders = {"models/me/toy": base}
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        weights = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert [w.rpartition("/")[0].rpartition("/")[2] for w in weights] == ["safety_checker"]
    checker(Path(done.stdout.strip()), "cpu")([Image.new("RGB", (32, 32))])
