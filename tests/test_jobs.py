"""What goes wrong in the workers that draw, encode and score, in a sentence."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stored import make_run

from raybooth.cluster.rows import map_rows
from raybooth.cluster.session import Resources
from raybooth.config import Sampling
from raybooth.errors import RayboothError
from raybooth.jobs import encoder, featurizer, sampler
from raybooth.photos import png

MAKERS: dict[str, tuple[Callable[..., Any], str, str, list[str]]] = {
    "drawing": (partial(sampler, model_stage="base-model", sampling=Sampling(2, 1.0, "ddim", 32), batch=1, model_digest=""), "opened",
                "raybooth.sample.Sampler.draw", ["cluster.sample_batch", "cluster.samplers", "base.resolution"]),
    "encoding": (partial(encoder, prompts=True), "for_inference", "raybooth.families.parts.encode_image", ["cluster.samplers", "base.resolution"]),
    "scoring": (featurizer, "stage_folder", "", ["cluster.samplers", "evaluate.dino", "evaluate.clip"]),
}  # fmt: skip


def no_room(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> str:
    return str(make_run(tmp_path_factory.mktemp("jobs") / "run", toy, 0))


@pytest.mark.parametrize("what", MAKERS)
def test_out_of_memory_names_what_needs_less(storage: str, what: str, monkeypatch: pytest.MonkeyPatch):
    """Where the model is loaded, and where it works."""
    make, loads, works, named = MAKERS[what]
    with monkeypatch.context() as patch:
        patch.setattr(f"raybooth.jobs.{loads}", no_room)
        with pytest.raises(RayboothError) as said:
            make(storage)
    assert str(said.value).lower().startswith(f"{what} ran out of memory")
    places = [str(said.value).index(name) for name in named]
    assert places == sorted(places)
    if works:
        monkeypatch.setattr(works, no_room)
        work = make(storage)
        with pytest.raises(RayboothError, match="ran out of memory"):
            work([{"name": "a", "prompt": "a dog", "seed": 1} if what == "drawing" else {"name": "a", "picture": png(Image.new("RGB", (32, 32)))}])


def test_a_sentence_from_a_worker_arrives_as_itself(storage: str, ray: None, capfd: pytest.CaptureFixture[str]):
    make = partial(encoder, f"{storage}/fine-tuned-model", prompts=False)
    with pytest.raises(RayboothError) as said:
        list(map_rows(make, [{"name": "a"}], batch=1, have=Resources(1, 0, 1)))
    assert str(said.value).startswith("There is no model folder")
    assert "\n" not in str(said.value)
    assert "ERROR" not in capfd.readouterr().err
