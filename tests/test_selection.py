"""Which checkpoint becomes the model: the rule, what is exported, and a run that overfits."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from raybooth import config, selection
from raybooth.demo import photographs
from raybooth.drawing import draw, output_rows
from raybooth.features import features
from raybooth.files import write_atomically
from raybooth.score import to_prompt, to_subject
from raybooth.sections import Sampling
from raybooth.selection import RULES, Candidate
from raybooth.session import Run
from raybooth.stages import STAGES
from raybooth.verbs import do
from raybooth.workspace import Workspace


def test_balance_pays_neither_a_subject_beyond_the_photographs_nor_a_prompt_beyond_the_base():
    whole = Candidate(1, dino=0.9, clip_t=0.5, own=0.9, base=0.5)
    assert whole.balance == 2
    assert Candidate(1, 0.99, 0.6, 0.9, 0.5).balance == 2
    assert Candidate(1, 0.45, 0.6, 0.9, 0.5).balance == 1.5
    assert RULES["subject"](Candidate(1, 0.99, 0.1, 0.9, 0.5)) > RULES["subject"](whole)


@pytest.mark.parametrize("own", [0.9, 0.05, 0.0, -0.05])
@pytest.mark.parametrize("base", [0.3, 0.0, -0.05])
def test_balance_never_falls_while_a_score_rises(own: float, base: float):
    """Whatever the anchors are: cosines may be nought or less."""
    scores = [-0.5, -0.1, -0.05, -0.01, 0.0, 0.01, 0.2, 0.9]
    for rising in ([Candidate(1, x, base, own, base).balance for x in scores], [Candidate(1, own, x, own, base).balance for x in scores]):
        assert rising == sorted(rising)
        assert rising[0] < 2
        assert rising[-1] == pytest.approx(2)


def test_checkpoints_are_compared_by_pictures_of_the_subject(tmp_path: Path):
    def drawn(*prompts: str) -> list[str]:
        given = [f"generate.prompts={[*prompts]}", "evaluate.select=balance"]
        run = Run(config.load(None, given, subject={"class": "dog"}, base={"model": "mini"}, storage=str(tmp_path)), quiet=True)
        return list(dict.fromkeys(row["prompt"] for row in selection.rows_of(run)))

    assert drawn("photo of a {class}", "a car", "{subject} at night", "a {token}") == ["unqtkn dog at night", "a unqtkn"]
    assert drawn(*(f"{{subject}} {i}" for i in range(6))) == [f"unqtkn dog {i}" for i in range(4)]
    assert drawn("photo of a {class}") == ["photo of unqtkn dog"]


@pytest.fixture(scope="module")
def overfit(tmp_path_factory: pytest.TempPathFactory, ray: None, fits_here: None) -> Run:
    """Without prior preservation, up to ten times mini's learning rate: it learns the dog, and then forgets all else."""
    storage = tmp_path_factory.mktemp("overfit")
    photographs(storage / "photographs")
    made = config.load(
        None,
        ["evaluate.select=balance", "prior.images=0", "finetune.steps=80", "finetune.lr=2e-3", "finetune.warmup=80", "finetune.schedule=constant",
         "finetune.text_encoder_lr=2e-3", "finetune.checkpoint_every=20", "finetune.checkpoints=4", "generate.images_per_prompt=2", "generate.steps=8",
         "generate.prompts=['photo of {subject} in the snow', 'photo of {subject} on the beach', 'photo of {subject} at night']"],
        subject={"photos": [str(storage / "photographs")], "class": "dog"}, base={"model": "mini"}, storage=str(storage),
    )  # fmt: skip
    with Run(made, quiet=True) as run:
        do(run, STAGES)
    return run


def taken(run: Run) -> tuple[int, str]:
    step = run.facts("fine-tuned-model")["selected"]["step"]
    [folder] = [p.name for p in (run.workspace.root / "checkpoints").glob(f"*-{step:07d}")]
    return step, f"checkpoints/{folder}"


def test_an_earlier_checkpoint_is_taken_and_is_better_on_seeds_that_it_was_not_chosen_by(overfit: Run):
    found = overfit.facts("fine-tuned-model")["selected"]["candidates"]
    step, folder = taken(overfit)
    assert [c["step"] for c in found] == [20, 40, 60, 80]
    assert step < 80
    rows = output_rows(overfit)
    names = [r["name"] for r in rows]
    with overfit:
        draw(overfit, "last-images", folder.replace(f"{step:07d}", "0000080"), overfit.config.generate, rows, {"seed": 0})
        pictures = {"photographs": ("instance-images", overfit.facts("instance-images")["pictures"]), "taken": ("output-images", names)}
        drawn = features(overfit, "test-features", pictures | {"last": ("last-images", names)}, [overfit.config.without_token(r["prompt"]) for r in rows])

    def balance(kind: str) -> float:
        dino = float(to_subject(drawn[kind]["dino"], drawn["photographs"]["dino"]).mean())
        return Candidate(0, dino, float(to_prompt(drawn[kind]["clip"], drawn["prompts"]["clip"]).mean()), found[0]["own"], found[0]["base"]).balance

    assert balance("taken") > balance("last") + 0.1


def test_what_is_taken_is_what_the_checkpoint_holds_and_draws(overfit: Run, tmp_path: Path):
    root, (step, folder) = overfit.workspace.root, taken(overfit)
    state = load_file(root / folder / "state.safetensors")
    for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        weights = load_file(root / "fine-tuned-model" / part / file)
        assert all(np.array_equal(v, state[f"weights.{part}.{k.removeprefix('text_model.')}"]) for k, v in weights.items())
    row = selection.rows_of(overfit)[0]
    with overfit:
        draw(overfit, "again-images", "fine-tuned-model", overfit.config.generate, [row], {"seed": 0})
    with Image.open(root / "again-images" / row["name"]) as again, Image.open(root / selection.FOLDER / f"{step:07d}" / row["name"]) as drawn:
        assert np.array_equal(np.asarray(again), np.asarray(drawn))


def test_another_rule_takes_another_without_training_again(overfit: Run):
    run = Run(config.load(overfit.workspace.root / "config.json", ["evaluate.select=subject"]), quiet=True)
    found = run.facts("fine-tuned-model")["selected"]["candidates"]
    before = {p: p.stat().st_mtime_ns for p in (run.workspace.root / "checkpoints").rglob("*.safetensors")}
    took = run.workspace.manifest("fine-tuned-model")["seconds"]
    with run:
        do(run, ["finetune"])
    chosen = run.facts("fine-tuned-model")["selected"]
    assert chosen["rule"] == "subject"
    assert chosen["step"] == max(found, key=lambda c: c["dino"])["step"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert run.workspace.manifest("fine-tuned-model")["seconds"] > took, "the training took its time, whatever was chosen of it later"


def test_a_model_that_was_chosen_stays_chosen_whatever_is_drawn_with_it(overfit: Run, capsys: pytest.CaptureFixture[str]):
    """Though there were no checkpoints left to go on from: what it was chosen by is kept with it."""
    root = overfit.workspace.root
    (root / "checkpoints").rename(root / "elsewhere")
    chosen = overfit.facts("fine-tuned-model")["selected"]
    other = ["generate.prompts=['{subject} on the water']", "generate.steps=3", "generate.guidance=1", "generate.scheduler=ddim"]
    with Run(config.load(root / "config.json", [f"evaluate.select={chosen['rule']}", *other])) as run:
        do(run, ["finetune"])
    (root / "elsewhere").rename(root / "checkpoints")
    assert capsys.readouterr().err == "fine-tuned-model: up to date\n"
    assert chosen["drawn"]["prompts"] == [f"photo of unqtkn dog {place}" for place in ("in the snow", "on the beach", "at night")]
    assert (chosen["drawn"]["steps"], chosen["drawn"]["scheduler"]) == (8, "dpmsolver++")


def test_a_better_checkpoint_that_another_machine_exports_is_what_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a remote storage. The driver holds the last step's weights by then, under the same names."""
    uri, target = f"memory://{tmp_path.name}/run", "fine-tuned-model/.partial-x"
    monkeypatch.setattr(Run, "ray", None)
    monkeypatch.setattr(selection, "candidates", lambda *_: [Candidate(1, 0.9, 0.5, 0.9, 0.5), Candidate(2, 0.1, 0.5, 0.9, 0.5)])
    monkeypatch.setattr(selection, "model_bytes", lambda *_: 0)
    monkeypatch.setattr(selection, "sampling", lambda *_: Sampling(1, 1.0, "euler", 64))
    run = Run(config.load(None, ["evaluate.select=balance"], subject={"class": "dog"}, base={"model": "mini"}, storage=uri), quiet=True)

    def export(*_: object, **__: object) -> list[tuple[str, bytes]]:
        with pytest.MonkeyPatch.context() as there:
            there.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
            other = Workspace(uri)
            write_atomically(other.root / target / "weights", b"best")
            other.push_tree(target)
        return []

    monkeypatch.setattr("raybooth.cluster.rows.map_rows", export)
    write_atomically(run.workspace.root / target / "weights", b"last")
    run.workspace.push_tree(target)
    assert selection.select(run, {1: "checkpoints/a", 2: "checkpoints/b"}, target)["step"] == 1
    assert (run.workspace.root / target / "weights").read_bytes() == b"best"
