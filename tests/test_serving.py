"""Many subjects on one base: a picture is the same alone, in a mixed batch, in another slot; and as PEFT merges it. What is found, and raybooth.load."""

import asyncio
import contextlib
import json
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored import make_adapters, make_run
from toys import MAKERS

import raybooth
from raybooth.checkpoint import Checkpoints
from raybooth.config import load
from raybooth.drawing import draw, output_rows
from raybooth.errors import NotFiniteError, RayboothError
from raybooth.families import family_of
from raybooth.families.foreign import plain_rank
from raybooth.families.lora import WEIGHTS, load_adapters
from raybooth.jobs import drawing_digest, for_inference, sampler
from raybooth.manifest import describe
from raybooth.pictures import png
from raybooth.sample import Sampler
from raybooth.serving import engine
from raybooth.serving.adapters import slot_bytes
from raybooth.serving.batcher import Batcher, Drawn, Job
from raybooth.serving.engine import Engine, Row
from raybooth.serving.subjects import BASE, Subject, Subjects
from raybooth.session import Run
from raybooth.train import State
from raybooth.workspace import Workspace

PROMPT = "photo of a red dog"
CONFIG = load(subject={"class": "dog"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """Three of adapters, one of DoRA, one whole."""
    folder = tmp_path_factory.mktemp("runs")
    for i, rank in enumerate((2, 4, 8)):
        make_run(folder / f"subject-{i}", toy, i, rank=rank)
    make_run(folder / "dora", toy, 7, dora=True)
    make_run(folder / "whole", toy, None)
    return folder


def found(folder: Path) -> dict[str, Subject]:
    return Subjects([str(folder)]).found()


def rows_of(subjects: dict[str, Subject], *ids: str) -> list[Row]:
    return [Row(subjects[i], PROMPT, 5) for i in ids]


def merged(row: Row) -> np.ndarray:
    """The picture as the run itself draws it, its adapters merged into the base."""
    subject = row.subject
    folder = subject.weights if subject.kind == "full" else subject.base_folder
    assert folder is not None
    family = family_of(folder)
    loaded = for_inference(folder, (family.denoiser, "vae", *family.encoders))
    if subject.kind == "lora":
        load_adapters(family, loaded, subject.weights)
    return next(iter(Sampler(family, loaded, subject.sampling, subject.batch).draw([row.prompt], [row.seed])))


def test_a_picture_is_the_same_alone_in_a_mixed_batch_and_in_another_slot(runs: Path):
    subjects = found(runs)
    base = subjects[BASE]
    rows = rows_of(subjects, "subject-0", "subject-1", BASE, "subject-2")
    engine, other = Engine(base, 16), Engine(base, 16, slots=4)
    together = engine.draw(rows, base.sampling)
    for i, row in enumerate(rows):
        assert np.array_equal(together[i], engine.draw([row], base.sampling)[0])
    assert np.array_equal(together, other.draw(rows[::-1], base.sampling)[::-1])
    mean = np.abs(together[:, None].astype(int) - together[None]).mean((2, 3, 4))
    assert (mean + 9 * np.eye(4) > 1).all(), "each subject has its own picture"
    for i, row in enumerate(rows):
        assert np.abs(together[i].astype(int) - merged(row)).max() <= 1
    assert np.array_equal(together[2], merged(rows[2])), "the base is the base, to the bit"


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_in_bfloat16_too(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, where the run has its adapters beside the base as well."""
    monkeypatch.setattr("raybooth.method.drawing_dtype", lambda *_: torch.bfloat16)
    base_folder = MAKERS[name](tmp_path / "base")
    make_adapters(base_folder, tmp_path, 0)
    shutil.move(tmp_path / WEIGHTS, tmp_path / "subject.safetensors")
    subjects = Subjects([str(tmp_path / "subject.safetensors")], base_folder).found()
    sampling = replace(subjects[BASE].sampling, steps=2, guidance=3.0, scheduler="euler", resolution=32)
    row, base = (Row(replace(subjects[k], sampling=sampling, batch=2), PROMPT, 5) for k in ("subject", BASE))
    engine = Engine(base.subject, 16)
    served, plain = (engine.draw([r], sampling)[0].astype(int) for r in (row, base))
    assert np.abs(served - merged(row)).mean() < 0.2 * np.abs(served - plain).mean()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_in_the_other_families_too(tmp_path: Path, name: str):
    base_folder = MAKERS[name](tmp_path / "base")
    for i in range(2):
        make_adapters(base_folder, tmp_path / f"{i}", i)
        shutil.move(tmp_path / f"{i}" / WEIGHTS, tmp_path / f"subject-{i}.safetensors")
    subjects = Subjects([str(tmp_path / "subject-0.safetensors"), str(tmp_path / "subject-1.safetensors")], base_folder).found()
    sampling = replace(subjects[BASE].sampling, steps=2, guidance=3.0, scheduler="euler", resolution=32)
    subjects = {k: replace(s, sampling=sampling, batch=2) for k, s in subjects.items()}
    engine = Engine(subjects[BASE], 16)
    rows = rows_of(subjects, "subject-0", "subject-1")
    together = engine.draw(rows, sampling)
    assert np.abs(together[0].astype(int) - together[1]).mean() > 1
    for picture, row in zip(together, rows, strict=True):
        assert np.array_equal(picture, engine.draw([row], sampling)[0])
        assert np.abs(picture.astype(int) - merged(row)).max() <= 1


def test_slots_are_reused_and_nothing_is_left_in_them(runs: Path):
    subjects = found(runs)
    base = replace(subjects[BASE], batch=1)
    engine = Engine(base, 16, slots=1)
    first, second, plain = ([engine.draw(rows_of(subjects, i), base.sampling)[0] for i in ("subject-2", "subject-0", BASE)] for _ in range(3))
    assert all(np.array_equal(a, b) and np.array_equal(b, c) for a, b, c in zip(first, second, plain, strict=True))
    assert len(engine.adapters.held) == 1


def test_dora_and_whole_models_are_drawn_by_themselves_as_the_run_draws_them(runs: Path):
    subjects = found(runs)
    assert [subjects[i].rank for i in ("subject-0", "subject-2", "dora", "whole")] == [2, 8, 0, 0]
    assert {s.id: s.kind for s in subjects.values()} == {BASE: "base", "dora": "lora", "whole": "full", **{f"subject-{i}": "lora" for i in range(3)}}
    engine = Engine(subjects[BASE], 16, whole=1)
    for name in ("dora", "whole", "dora"):
        row = rows_of(subjects, name)[0]
        assert engine.group(row)[0] == f"{row.subject.base} {row.subject.model}"
        assert np.array_equal(engine.draw([row], row.subject.sampling)[0], merged(row))
        assert len(engine._models) == 1
    assert not Engine(subjects[BASE], 4).shared(subjects["subject-2"]), "too large for the slots"


def test_what_it_will_be_can_be_seen_on_the_way(runs: Path):
    subjects = found(runs)
    base, seen = subjects[BASE], []
    final = Engine(base, 16).draw(rows_of(subjects, BASE), replace(base.sampling, steps=6), lambda done, look: seen.append((done, look([0])[0])))
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]
    apart = [np.abs(picture.astype(int) - final[0]).mean() for _, picture in seen]
    assert apart[0] > apart[-1]
    assert apart[-1] < 1


def test_a_model_that_is_gone_or_is_being_replaced_says_so(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "subject-0", tmp_path / "a")
    shutil.copytree(runs / "subject-1", tmp_path / "b")
    subjects = found(tmp_path)
    engine = Engine(subjects[BASE], 16)
    shutil.copyfile(runs / "subject-1" / "fine-tuned-model" / WEIGHTS, tmp_path / "a" / "fine-tuned-model" / WEIGHTS)
    with pytest.raises(RayboothError, match="'a' cannot be loaded: it is just being replaced"):
        engine.draw(rows_of(subjects, "a"), subjects["a"].sampling)
    assert not engine.adapters.held
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(RayboothError, match="'b' cannot be loaded"):
        engine.draw(rows_of(subjects, "b"), subjects["b"].sampling)
    shutil.rmtree(tmp_path / "a")
    assert len(engine.draw(rows_of(subjects, BASE), subjects[BASE].sampling)) == 1, "the base stays, wherever it was read from"


@pytest.fixture
def misfit(runs: Path, tmp_path: Path) -> Path:
    """A folder of two files of adapters: one that fits, and one whose matrices are of another base."""
    shutil.copyfile(runs / "subject-0" / "fine-tuned-model" / WEIGHTS, tmp_path / "good.safetensors")
    held = load_file(tmp_path / "good.safetensors")
    with safe_open(tmp_path / "good.safetensors", "pt") as file:
        told = file.metadata()
    save_file({k: v.repeat(1, 2) if "lora_A" in k else v for k, v in held.items()}, tmp_path / "bad.safetensors", told)
    return tmp_path


def test_adapters_that_do_not_fit_fail_alone(runs: Path, misfit: Path):
    subjects = Subjects([str(misfit)], runs / "subject-0" / "base-model").found()
    batcher = Batcher(Engine(subjects[BASE], 16))

    async def drawn(name: str) -> list[Drawn]:
        row = Row(subjects[name], PROMPT, 5)
        return [picture async for picture in batcher.draw(Job((row,), replace(subjects[BASE].sampling, steps=1)))]

    async def scenario() -> None:
        good, bad, base = await asyncio.gather(*map(drawn, ("good", "bad", BASE)), return_exceptions=True)
        assert isinstance(bad, RayboothError)
        assert "'bad' cannot be loaded" in str(bad)
        for one in (good, base):
            assert isinstance(one, list), one
            assert one[0].batch == 2

    asyncio.run(scenario())


def test_what_draws_no_picture_fails_alone(runs: Path, tmp_path: Path, toy: Path):
    """Adapters with finite but enormous values: everybody else in the batch gets the picture that they get alone."""
    make_run(tmp_path / "wild", toy, 3)
    weights = load_file(tmp_path / "wild" / "fine-tuned-model" / WEIGHTS)
    save_file({k: t * 1e30 for k, t in weights.items()}, tmp_path / "wild" / "fine-tuned-model" / WEIGHTS)
    manifest = tmp_path / "wild" / "fine-tuned-model" / "manifest.json"
    said = json.loads(manifest.read_text())
    said["outputs"][WEIGHTS] = describe(manifest.with_name(WEIGHTS))
    manifest.write_text(json.dumps(said))
    shutil.copytree(runs / "subject-0", tmp_path / "good")
    subjects = Subjects([str(tmp_path)], tmp_path / "good" / "base-model").found()
    batcher = Batcher(Engine(subjects[BASE], 16))

    async def drawn(name: str) -> list[Drawn]:
        row = Row(subjects[name], PROMPT, 5)
        return [picture async for picture in batcher.draw(Job((row,), replace(subjects[BASE].sampling, steps=2), partials=1))]

    async def scenario() -> None:
        alone = [await drawn(name) for name in ("good", BASE)]
        wild, *together = await asyncio.gather(*map(drawn, ("wild", "good", BASE)), return_exceptions=True)
        assert isinstance(wild, NotFiniteError)
        assert [one[-1].png for one in together] == [one[-1].png for one in alone]  # type: ignore[index, union-attr]

    asyncio.run(scenario())
    assert pickle.loads(pickle.dumps(NotFiniteError([2]))).rows == [2]  # it comes from a replica


def test_slots_are_as_many_as_there_is_memory_for(runs: Path, monkeypatch: pytest.MonkeyPatch):
    subjects = found(runs)
    base = subjects[BASE]
    roomy = Engine(base, 16)
    assert roomy.adapters.slots == 32
    each = slot_bytes([roomy.adapters.modules["unet"], roomy.adapters.modules["text_encoder"]], 16)
    for held, slots in ((5 * each, 5), (0, base.batch)):
        monkeypatch.setattr(engine, "MEMORY", held)
        made = Engine(base, 16)
        assert made.adapters.slots == slots
        made.draw(rows_of(subjects, "subject-0", "subject-1"), replace(base.sampling, steps=1))
        taken = sum(t.nbytes for layer in made.adapters.layers.values() for t in (layer.down, layer.up))
        assert 0 < taken <= (slots + 1) * each


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Not root, who may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("locked", ["runs/subject-0", "runs/subject-0/fine-tuned-model", "more"])
def test_what_cannot_be_read_is_passed_over_once(runs: Path, locked: str):
    said: list[str] = []
    with tempfile.TemporaryDirectory() as name:  # under which everybody may look, as not everywhere that pytest has its own
        root = Path(name)
        for i in range(2):
            shutil.copytree(runs / f"subject-{i}", root / "runs" / f"subject-{i}")
        (root / "more").mkdir()
        subjects = Subjects([str(root / "runs"), str(root / "more")], every=0, say=said.append)
        assert set(subjects.found()) == {BASE, "subject-0", "subject-1"}
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        (root / locked).chmod(0o000)
        with nobody():
            left = [set(subjects.found()) for _ in range(3)]
        assert left == [{BASE, "subject-1"} | ({"subject-0"} if locked == "more" else set())] * 3
        assert [line.partition(" is passed over")[0] for line in said] == [str(root / locked.removesuffix("/fine-tuned-model"))]
        (root / locked).chmod(0o755)
        assert set(subjects.found()) == {BASE, "subject-0", "subject-1"}


def test_adapters_on_another_base_than_theirs_are_passed_over(runs: Path, tmp_path: Path):
    """As `generate` refuses them: another model was prepared in the storage since."""
    storage, said = tmp_path / "moved", list[str]()
    shutil.copytree(runs / "subject-0", storage)
    manifest = storage / "fine-tuned-model" / "manifest.json"
    held = json.loads(manifest.read_text())
    held["inputs"]["model"] = "another"
    manifest.write_text(json.dumps(held))
    assert set(Subjects([str(tmp_path)], base=runs / "subject-1" / "base-model", every=0, say=said.append).found()) == {BASE}
    assert "belong to another base model than the one that lies there now" in said[0]


def test_subjects_appear_and_disappear(runs: Path, tmp_path: Path):
    said: list[str] = []
    subjects = Subjects([str(tmp_path)], every=0, say=said.append)
    assert subjects.found() == {}
    with pytest.raises(RayboothError, match="no finished run"):
        _ = subjects.base
    shutil.copytree(runs / "subject-0", tmp_path / "one")
    assert list(subjects.found()) == [BASE, "one"]
    (tmp_path / "half" / "fine-tuned-model" / ".partial-0").mkdir(parents=True)
    shutil.copytree(runs / "subject-1", tmp_path / "two words")
    shutil.copytree(runs / "subject-1", tmp_path / BASE)
    shutil.copytree(runs / "subject-1", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    shutil.copyfile(runs / "subject-2" / "fine-tuned-model" / WEIGHTS, tmp_path / "alone.safetensors")
    now = subjects.found()
    assert sorted(now) == ["alone", BASE, "one"]
    assert now["alone"].base == now["one"].base == subjects.base.base
    assert (now["one"].token, now["one"].class_name, len(now["one"].photographs)) == ("unqtkn", "dog", 1)
    subjects.found()
    assert [line.split(" is passed over")[0].rpartition("/")[2] for line in sorted(said)] == ["fine-tuned-model", "broken", "fine-tuned-model"]
    shutil.rmtree(tmp_path / "one")
    assert sorted(subjects.found()) == ["alone", BASE]
    with pytest.raises(RayboothError, match="There is no"):
        Subjects([str(tmp_path / "none")])


def test_the_base_model_named_and_the_runs_own_are_one(runs: Path, toy: Path):
    assert Subjects([str(runs)], toy).base.base == found(runs)[BASE].base


def test_prompts_are_filled_in_and_nothing_else_is(runs: Path):
    subjects = found(runs)
    prompt = "photo of {subject}, a {class} {token:>99} {{subject}} {red} {}"
    assert subjects["whole"].fill(prompt) == "photo of unqtkn dog, a dog {token:>99} {unqtkn dog} {red} {}" == CONFIG.fill(prompt)
    with pytest.raises(RayboothError, match="has no subject of its own"):
        subjects[BASE].fill("photo of {subject}")


def test_convolutions_have_no_place_in_a_slot(tmp_path: Path, toy: Path):
    make_adapters(toy, tmp_path, 0, targets=["to_q", "q_proj", "conv1"])
    assert plain_rank(tmp_path / WEIGHTS) == 0


def test_load_draws_what_generate_draws(runs: Path, tmp_path: Path):
    for name in ("subject-0", "whole"):
        model = raybooth.load(runs / name)
        pictures = model.draw("photo of {subject} in the snow", n=5, seed=11)
        torch.set_num_threads(1)
        rows = [{"prompt": "photo of unqtkn dog in the snow", "seed": 11 + k} for k in range(5)]
        stage = sampler(str(runs / name), "fine-tuned-model", model._sampler.sampling, 4, drawing_digest(Workspace(str(runs / name)), "fine-tuned-model"))(rows)
        for picture, data in zip(pictures, stage, strict=True):
            file = tmp_path / "picture.png"
            file.write_bytes(data)
            with Image.open(file) as theirs:
                assert picture.tobytes() == theirs.tobytes()
                assert picture.info == theirs.info
        assert model.draw("photo of {subject} in the snow", n=1, seed=13)[0].tobytes() == pictures[2].tobytes()
    shown = pictures._repr_png_()
    assert shown is not None
    assert shown.startswith(b"\x89PNG")


def test_adapters_and_checkpoints_are_as_large_as_the_base_that_they_are_put_on(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Or every core would have a copy of a large one, each drawn by one thread."""
    storage, sizes = tmp_path / "run", []
    shutil.copytree(runs / "subject-0", storage)

    def drawn(make: object, rows: list[dict[str, Any]], *, model_bytes: int, **_: object) -> Iterator[tuple[str, bytes]]:
        sizes.append(model_bytes)
        return ((r["name"], png(Image.new("RGB", (32, 32)))) for r in rows)

    monkeypatch.setattr("raybooth.drawing.map_rows", drawn)
    monkeypatch.setattr(Run, "ray", None)
    with Run(load(storage / "config.json", storage=str(storage)), quiet=True) as run:
        checkpoints = Checkpoints(run.workspace, "k" * 64, 1, {"seed": 0})
        checkpoints.save(State(5, {"weights.a": torch.zeros(3)}, {}))
        checkpoints.wait()
        for stage in ("base-model", "fine-tuned-model", checkpoints.complete()[0][5]):
            draw(run, "output-images", stage, run.config.generate, output_rows(run), {})
    assert len(set(sizes)) == 1
    assert sizes[0] > 500_000 > sum(o["bytes"] for o in Workspace(str(storage)).manifest("fine-tuned-model")["outputs"].values())
    monkeypatch.setattr("raybooth.cluster.rows.SMALL", 500_000)
    assert raybooth.load(storage)._threads == os.cpu_count()


def test_load_says_what_is_wrong(runs: Path, tmp_path: Path):
    with pytest.raises(RayboothError, match="There is no storage"):
        raybooth.load(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(RayboothError, match="holds no complete fine-tuned-model"):
        raybooth.load(tmp_path)
    model = raybooth.load(runs / "subject-0")
    odd = (
        ({"n": 1.5}, "n = 1.5"),
        ({"guidance": float("nan")}, "guidance = nan"),
        ({"guidance": -3.0}, "guidance = -3.0"),
        ({"prompt": ["x"]}, "A prompt is a text"),
    )
    for wrong, told in (({"n": 0}, "n = 0"), ({"steps": 0}, "steps = 0"), *odd):
        with pytest.raises(RayboothError, match=told):
            model.draw(**{"prompt": "x", **wrong})  # type: ignore[arg-type]


def test_looking_is_safe_from_many_threads(runs: Path):
    subjects = Subjects([str(runs)], every=0)
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(len(subjects.found()))) for _ in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [6] * 8
    assert time.monotonic() - began < 20


def test_a_run_that_is_named_and_cannot_be_served_under_its_name_is_refused(tmp_path: Path, toy: Path):
    """In a folder of several it is passed over: the others can be had."""
    make_run(tmp_path / "two words", toy, 1)
    with pytest.raises(RayboothError, match="cannot be served: its name 'two words' is not one of letters"):
        Subjects([str(tmp_path / "two words")])
    assert "two words" not in Subjects([str(tmp_path)]).found()
