"""The fine-tuning job of one worker, in this process: what it does with checkpoints and readings when it is stopped and goes on."""

import gc
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import alone

from raybooth import config
from raybooth.checkpoint import Checkpoints
from raybooth.errors import RayboothError
from raybooth.files import files_under
from raybooth.finetune_job import exporter, finetuner
from raybooth.planning import plan
from raybooth.remote import Remote
from raybooth.sections import Finetune, Lora, Prior
from raybooth.train import State
from raybooth.workspace import Workspace

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


def tuned(storage: str | Path, key: str = X, stop: int | None = None, heard: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """What the worker returns; with `stop` it ends after the reading of that step. `heard` gets what it says."""
    finetune = Finetune(**{**dict(steps=6, log_every=1, checkpoint_every=2, trackers=[]), **more})

    def say(word: dict[str, Any]) -> None:
        if heard is not None:
            heard.append(word)
        if word.get("step") == stop is not None:
            raise StoppedError

    loop: Callable[..., dict[str, Any]] = finetuner(str(storage), "fine-tuned-model/new", key, ROWS, PROMPTS, Prior(), finetune, Lora(), 0, True)
    group = alone()
    if stop is None:
        return loop(group, say)
    with pytest.raises(StoppedError):
        loop(group, say)
    return {}


def test_a_checkpoint_that_was_gone_on_from_is_let_go_of(storage: Path, monkeypatch: pytest.MonkeyPatch):
    tuned(storage, stop=3)
    read: list[weakref.ref[State]] = []
    newest, save = Checkpoints.newest, Checkpoints.save

    def watched(self: Checkpoints, *agreed: Any) -> Any:
        state, notes = newest(self, *agreed)
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


@pytest.mark.parametrize("how", [{"method": "lora", "precision": "bf16"}, {"method": "lora", "precision": "fp32"}, {"precision": "bf16-weights"}, {}])
def test_a_chosen_checkpoint_is_saved_as_its_training_would_have_saved_it(storage: Path, how: dict[str, Any]):
    """Adapters too, whose base is held in half precision then: a large one may have no room in float32."""
    tuned(storage, **how)
    (last,) = (storage / "checkpoints").glob("*-0000006")
    exporter(str(storage), f"checkpoints/{last.name}", "fine-tuned-model/chosen")([{"name": "model"}])
    made, chosen = storage / "fine-tuned-model" / "new", storage / "fine-tuned-model" / "chosen"
    weights = [name for name in files_under(made) if name.endswith(".safetensors")]
    assert files_under(chosen) == files_under(made)
    assert weights
    for name in weights:
        saved, wanted = load_file(chosen / name), load_file(made / name)
        assert saved.keys() == wanted.keys()
        assert all(saved[k].dtype == wanted[k].dtype and torch.equal(saved[k], wanted[k]) for k in wanted)


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows]


def written(root: Path) -> list[tuple[int, float]]:
    return losses([json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()])


def test_a_configuration_that_is_gone_back_to_has_its_own_readings(storage: Path):
    whole = losses(tuned(storage, "c" * 64)["history"])
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
    tuned(storage, X, stop=5)
    tuned(storage, Y, stop=3, lr=0.01)
    assert losses(tuned(storage, X)["history"]) == whole == written(storage)


@pytest.mark.parametrize("stop", [5, 8, 11])
def test_a_run_that_goes_on_reads_validation_at_the_same_steps(storage: Path, stop: int):
    """Also where a checkpoint lies between two readings."""

    def validations(rows: list[dict[str, Any]]) -> list[tuple[int, float | None]]:
        return [(row["step"], row.get("validation_instance")) for row in rows]

    how: dict[str, Any] = {"steps": 12, "log_every": 3, "checkpoint_every": 4}
    whole = validations(tuned(storage, Y, **how)["history"])
    assert [step for step, value in whole if value is not None] == [3, 6, 9, 12]
    how["checkpoint_every"] = 5
    whole = validations(tuned(storage, "d" * 64, **how)["history"])
    assert [step for step, value in whole if value is not None] == [3, 6, 12]
    tuned(storage, X, **how, stop=6 if stop < 8 else 9 if stop < 11 else 12)
    assert validations(tuned(storage, X, **how)["history"]) == whole


def uploaded(storage: Path, uri: str) -> str:
    """What a fine-tuning reads of a storage, in another."""
    workspace = Workspace(uri)
    for name in ("base-model", "latents"):
        stage = workspace.stage(name, {})
        for file in files_under(storage / name):
            stage.write(file, (storage / name / file).read_bytes())
        stage.finish()
    return uri


def test_a_worker_of_another_machine_goes_on_with_the_readings(storage: Path, monkeypatch: pytest.MonkeyPatch):
    whole = losses(tuned(storage, Y)["history"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(storage / "one"))
    uri = uploaded(storage, "memory://tuning-test")
    tuned(uri, stop=5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(storage / "two"))
    assert losses(tuned(uri)["history"]) == whole
    monkeypatch.setenv("XDG_CACHE_HOME", str(storage / "three"))
    third = Workspace(uri)
    assert third.remote
    (third.root / "metrics.jsonl").write_bytes(third.remote.read("metrics.jsonl"))
    assert written(third.root) == whole


def test_readings_that_do_not_arrive_end_no_run(storage: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor do they hide what does end it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(storage / "one"))
    uri, heard, put = uploaded(storage, f"file://{storage}/bucket"), list[dict[str, Any]](), Remote.put

    def refused(self: Remote, name: str, file: Path) -> None:
        if name.startswith(("metrics", "tensorboard")):
            raise RayboothError("The storage is away.")
        put(self, name, file)

    monkeypatch.setattr(Remote, "put", refused)
    tuned(uri, stop=1, trackers=["tensorboard"])
    assert [row["step"] for row in tuned(uri, heard=heard, trackers=["tensorboard"])["history"]] == [1, 2, 3, 4, 5, 6]
    assert len([word for word in heard if "The storage is away." in word.get("note", "")]) == 1
    assert (storage / "bucket" / "fine-tuned-model" / "new" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("how", "held_in"),
    [
        ({"checkpoint_every": 1}, torch.float32), ({"checkpoint_every": 1, "checkpoints": 9}, torch.float32), ({"checkpoint_every": 6}, torch.float32),
        ({}, torch.float16), ({"precision": "bf16-weights"}, torch.bfloat16), ({"method": "lora"}, torch.float32),
    ],
    ids=["one more than are kept", "fewer than are kept", "one", "fp16", "bf16 weights", "lora"],
)  # fmt: skip
def test_a_plan_knows_what_is_stored(storage: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], held_in: torch.dtype):
    """But for the headers of files, which are no small part of a toy's."""
    base, sizes = storage / "base-model", list[int]()
    for weights in base.rglob("*.safetensors"):
        save_file({k: v.to(held_in) for k, v in load_file(weights).items()}, weights)

    def noted(path: Path) -> None:
        files = [f for part in ("base-model", "checkpoints", "fine-tuned-model") for f in (storage / part).rglob("*.safetensors")]
        sizes.append(sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in files))

    monkeypatch.setattr("raybooth.checkpoint._sync", noted)  # called when a checkpoint is there, and none has gone for it
    tuned(storage, **how)
    noted(storage)
    settings = [f"finetune.{k}={v}" for k, v in {"steps": 6, "checkpoint_every": 2, **how}.items()]
    few = ["prior.images=0", "generate.images_per_prompt=1", "generate.prompts=a", "evaluate.select=balance"]
    made = config.load(None, [*settings, *few], subject={"class": "dog"}, base={"model": str(base)})
    assert plan(base, made).stored == pytest.approx(max(sizes), rel=0.03)


class Services:
    """Both trackers, as far as they are called: runs by their id, and what each was told, (step, loss)."""

    def __init__(self) -> None:
        self.wandb: dict[str, list[tuple[int, float]]] = {}
        self.mlflow: list[dict[str, Any]] = []
        self.ended: list[bool] = []

    def end(self, status: str = "", exit_code: int = 9) -> None:
        self.ended.append(status == "FINISHED" or exit_code == 0)

    def init(self, **how: str) -> SimpleNamespace:
        assert (how["project"], how["resume"]) == ("raybooth", "allow")
        told = self.wandb.setdefault(how["id"], [])
        return SimpleNamespace(log=lambda numbers, step: told.append((step, numbers["loss"])), finish=self.end)

    def search_runs(self, filter_string: str, output_format: str) -> list[SimpleNamespace]:
        assert output_format == "list"
        return [SimpleNamespace(info=SimpleNamespace(run_id=r["id"])) for r in reversed(self.mlflow) if filter_string == f"tags.raybooth = '{r['tag']}'"]

    def start_run(self, run_id: str | None, run_name: str, tags: dict[str, str]) -> None:
        known = [r for r in self.mlflow if r["id"] == run_id]
        self.going: dict[str, Any] = known[0] if known else {"id": f"run {len(self.mlflow)}", "tag": tags["raybooth"], "told": []}
        self.mlflow += [] if known else [self.going]

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.going["told"].append((step, numbers["loss"]))


def test_trackers_go_on_with_the_run_of_their_configuration(storage: Path, monkeypatch: pytest.MonkeyPatch):
    services = Services()
    how: dict[str, Any] = {"trackers": ["wandb", "mlflow"]}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=services.init))
    mlflow = SimpleNamespace(
        set_experiment=lambda name: None, search_runs=services.search_runs, start_run=services.start_run, log_metrics=services.log_metrics, end_run=services.end
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    tuned(storage, X, stop=5, **how)
    assert services.ended == [False, False]
    other = losses(tuned(storage, Y, lr=0.01, **how)["history"])
    whole = losses(tuned(storage, X, **how)["history"])
    assert services.ended == [False, False, True, True, True, True]
    # Step 5 came after the checkpoint, and is told twice.
    assert [*services.wandb.values()] == [r["told"] for r in services.mlflow] == [whole[:5] + whole[4:], other]
