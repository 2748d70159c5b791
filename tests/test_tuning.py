"""The fine-tuning job of one worker, in this process: what it does with checkpoints and readings when it is stopped and goes on."""

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raybooth.checkpoint import Checkpoints
from raybooth.config import Finetune, Lora, Prior
from raybooth.train import Parallel, State
from raybooth.tuning import finetuner

ROWS = {"instance": ["0.safetensors", "1.safetensors"], "class": ["2.safetensors"]}
PROMPTS = {"instance": "photo of unqtkn dog", "class": "photo of a dog"}
X, Y = "a" * 64, "b" * 64


@pytest.fixture
def storage(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that a fine-tuning reads. What it saves there is written before the next step, so that a test knows what it stops at."""
    save = Checkpoints.save

    def at_once(self: Checkpoints, state: State) -> None:
        save(self, state)
        self.wait()

    monkeypatch.setattr(Checkpoints, "save", at_once)
    shutil.copytree(toy, tmp_path / "base-model")
    (tmp_path / "latents").mkdir()
    for i in range(3):
        latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(i))
        save_file({"mean": latents[0], "std": latents[1].abs()}, tmp_path / "latents" / f"{i}.safetensors")
    return tmp_path


class StoppedError(Exception):
    pass


def tuned(storage: str | Path, key: str = X, stop: int | None = None, **more: Any) -> dict[str, Any]:
    """What the worker returns; with `stop` it ends after the reading of that step."""
    finetune = Finetune(**{**dict(steps=6, log_every=1, checkpoint_every=2, trackers=[]), **more})

    def say(word: dict[str, Any]) -> None:
        if word.get("step") == stop is not None:
            raise StoppedError

    loop: Callable[..., dict[str, Any]] = finetuner(str(storage), "fine-tuned-model/new", key, ROWS, PROMPTS, Prior(), finetune, Lora(), 0, True)
    group = SimpleNamespace(device=torch.device("cpu"), where="here", **vars(Parallel()))
    if stop is None:
        return loop(group, say)
    with pytest.raises(StoppedError):
        loop(group, say)
    return {}


def test_a_checkpoint_that_was_gone_on_from_is_let_go_of(storage: Path, monkeypatch: pytest.MonkeyPatch):
    tuned(storage, stop=3)
    read: list[weakref.ref[State]] = []
    newest, save = Checkpoints.newest, Checkpoints.save

    def watched(self: Checkpoints) -> Any:
        state, notes = newest(self)
        assert state is not None
        read.append(weakref.ref(state))
        return state, notes

    def saved(self: Checkpoints, state: State) -> None:
        gc.collect()
        assert read[0]() is None
        save(self, state)

    monkeypatch.setattr(Checkpoints, "newest", watched)
    monkeypatch.setattr(Checkpoints, "save", saved)
    tuned(storage)
    assert len(read) == 1
