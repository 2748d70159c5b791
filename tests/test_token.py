"""Rare words for a subject: weak in the base model, read by its tokenizer as proposed, and taken by subject.token = "auto"."""

import json
import shutil
from pathlib import Path

import pytest
from finished import fine_tuned
from PIL import Image
from safetensors import safe_open
from test_pipeline import call

import raybooth
from raybooth.cli import main
from raybooth.config import load
from raybooth.errors import RayboothError
from raybooth.families import family_of, mini_folder
from raybooth.families.parts import load as load_parts
from raybooth.families.tokens import propose
from raybooth.mini.networks import make_tokenizer
from raybooth.sections import Lora


def test_words_that_mini_knows_are_strong_and_those_that_it_proposes_are_weak():
    folder = mini_folder()
    family = family_of(folder)
    loaded = load_parts(family, folder, ("text_encoder",))
    tokenizer, table = loaded.tokenizers["tokenizer"], loaded.modules["text_encoder"].get_input_embeddings().weight  # type: ignore[operator]
    norms = table.norm(dim=1) / table.norm(dim=1).median()
    known = [float(norms[tokenizer.convert_tokens_to_ids(f"{w}</w>")]) for w in ("dog", "snow", "beach", "night", "red", "collar")]
    found = propose(family, folder, 8)
    assert len({p.word for p in found}) == 8
    for proposal in found:
        assert tuple(tokenizer.tokenize(proposal.word)) == proposal.tokens
        assert tuple(tokenizer.tokenize(f"photo of {proposal.word} dog"))[2:-1] == proposal.tokens
        assert proposal.word.isalpha()
        assert 3 <= len(proposal.word) <= 6
        assert proposal.norm < min(known) / 1.3
    assert [p.strength for p in found] == sorted(p.strength for p in found)


def test_a_tokenizer_of_short_words_alone_is_refused_with_a_sentence(tmp_path: Path, toy: Path):
    folder = shutil.copytree(toy, tmp_path / "toy")
    shutil.rmtree(folder / "tokenizer")
    make_tokenizer(["we go up", "it is so"]).save_pretrained(folder / "tokenizer")
    with pytest.raises(RayboothError, match=r"knows no words of three letters.*choose subject\.token yourself"):
        propose(family_of(folder), folder)


def test_auto_names_the_subject_everywhere(tmp_path: Path, toy: Path, photos: Path):
    said = call("prepare", tmp_path, toy, photos, subject__token="auto")
    word = json.loads((tmp_path / "token" / "proposals.json").read_text())[0]["word"]
    assert f"'{word}' names the subject" in said
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["subject"]["token"] == word
    assert "up to date" in call("prepare", tmp_path, toy, photos, subject__token="auto")
    assert json.loads((tmp_path / "config.json").read_text()) == kept


def test_an_export_has_the_word_and_not_auto(tmp_path: Path, toy: Path):
    storage = fine_tuned(tmp_path / "run", toy, Lora(rank=2))
    config = load(None, ["subject.token=auto"], subject={"class": "dog"}, base={"model": str(toy)}, storage=str(storage))
    folder = Path(raybooth.export(config, "kohya"))
    word = json.loads((storage / "token" / "proposals.json").read_text())[0]["word"]
    (file,) = folder.glob("*.safetensors")
    assert file.name == f"{word}-dog.safetensors"
    with safe_open(file, "np") as held:
        assert held.metadata()["modelspec.trigger_phrase"] == f"{word} dog"
    assert f"`{word}`" in (folder / "README.md").read_text()


def test_the_verb_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["token", "--base", "mini", "--storage", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["word", "prior", "norm", "nearest", "common", "word"]
    assert len(lines) == 11
    config = load(None, [], subject={"class": "dog"}, base={"model": "mini"}, storage=str(tmp_path))
    assert [p["word"] for p in raybooth.token(config)] == [line.split()[0] for line in lines[1:]]


def test_the_verb_draws_them(tmp_path: Path, toy: Path, in_process: None):
    assert main(["token", "--base", str(toy), "--storage", str(tmp_path), "--set", "generate.steps=1", "--draw"]) == 0
    words = [p["word"] for p in json.loads((tmp_path / "token" / "proposals.json").read_text())]
    of = {(p.info["prompt"], p.info["seed"]) for p in map(Image.open, (tmp_path / "token-images").glob("*-?.png"))}
    assert {prompt for prompt, _ in of} == {f"photo of {word}" for word in words}
    assert len({seed for _, seed in of}) == 4
    assert len(of) == 4 * len(words)
    assert (tmp_path / "token-images" / "contact-sheet.png").exists()
