"""A Stable Diffusion of toy size, and photographs of it: enough to drive every line without waiting."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ["HF_ENDPOINT"] = os.environ.get("RAYBOOTH_TEST_ENDPOINT", "http://127.0.0.1:9")  # no test reaches the real hub

import pytest
from toys import make_sd

from raybooth.mini.world import render, subject_scenes


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, scene in enumerate(subject_scenes(1, "dog", 3)):
        render(scene).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, toy: Path, photos: Path) -> Path:
    """A fine-tuning that nothing has interrupted, the reference of those that something has."""
    from test_pipeline import LONGER, call

    storage = tmp_path_factory.mktemp("unbroken")
    for verb in ("prepare", "class-images", "encode", "finetune"):
        call(verb, storage, toy, photos, **LONGER)
    return storage
