"""What a complete model folder is."""

import shutil
from pathlib import Path

from raybooth.base_model import needed_of_folder


def test_a_part_may_be_a_link(toy: Path, tmp_path: Path):
    folder = shutil.copytree(toy, tmp_path / "model")
    (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    assert needed_of_folder(folder) == needed_of_folder(toy)


def test_a_tokenizer_may_have_its_words_in_two_files(toy: Path, tmp_path: Path):
    folder = shutil.copytree(toy, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "tokenizer" / "merges.txt").write_text("")
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(needed_of_folder(folder))
