"""LoRA files in a folder that is served: drawn as they say, whatever their layout, or passed over with the reason. Nothing that lies there stops the others."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import CLOSE, PROMPT, SAMPLING, apart, opened, theirs
from safetensors.torch import save_file
from stored import make_adapters, make_run
from test_import import TE, Tensors, by_hand, kohya, old_layout
from test_serving import merged
from toys import make_sdxl

from raybooth.errors import RayboothError
from raybooth.families import family_of
from raybooth.families.lora import WEIGHTS, add_adapters, save_adapters
from raybooth.families.parts import load
from raybooth.sections import Lora
from raybooth.serving.engine import Engine, Row
from raybooth.serving.subjects import BASE, Subject, Subjects

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
LINEAR = {"unet": [f"{ATTENTION}.to_k", f"{ATTENTION}.to_v"], "text_encoder": [TE, TE.replace("layers.0", "layers.1")]}
RANKS, ALPHAS = [4, 2, 3, 1, 4], [4.0, 1.0, 6.0, 0.5, 8.0]
EVEN = [2.0] * 5


def found(file: Path, base: Path) -> tuple[Engine, Subject]:
    subjects = {k: replace(s, batch=2) for k, s in Subjects([str(file)], base).found().items()}
    return Engine(subjects[BASE], 16), subjects[file.stem]


def in_pefts_layout(made: dict[str, tuple[torch.Tensor, torch.Tensor, float]], folder: Path) -> Tensors:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    return {f"base_model.model.{name.removeprefix('unet.')}.lora_{k}.weight": t for name, pair in made.items() for k, t in zip("AB", pair[:2], strict=True)}


def in_sdxls_first_names(made: dict[str, tuple[torch.Tensor, torch.Tensor, float]], folder: Path) -> Tensors:
    return {k.replace("down_blocks_1_attentions_0", "input_blocks_3_1"): t for k, t in kohya(made).items()}


UNET = {"unet": LINEAR["unet"]}
LAYOUTS = {
    "kohya": (None, RANKS, ALPHAS, LINEAR, lambda made, folder: kohya(made), 4),
    "kohya, convolutions": (None, RANKS, ALPHAS, None, lambda made, folder: kohya(made), 0),
    "diffusers, of old": (None, [2] * 5, EVEN, LINEAR, lambda made, folder: old_layout(made), 2),
    "PEFT": (None, [2] * 5, EVEN, UNET, in_pefts_layout, 2),
    "kohya, SDXL": (make_sdxl, RANKS, ALPHAS, UNET, in_sdxls_first_names, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_is_drawn_as_it_says_whatever_its_layout(toy: Path, tmp_path: Path, layout: str):
    make, ranks, alphas, layers, written, rank = LAYOUTS[layout]
    base = make(tmp_path / "base") if make else toy
    made, pipe = by_hand(base, ranks, alphas, *([layers] if layers else []))
    file = tmp_path / "theirs.safetensors"
    save_file(written(made, tmp_path), file)
    engine, subject = found(file, base)
    assert subject.rank == rank
    assert engine.shared(subject) == (rank > 0)
    wanted = theirs(pipe, base)
    assert apart(engine.draw([Row(subject, PROMPT, 1)], SAMPLING)[0] / 255.0, wanted) <= CLOSE
    assert apart(theirs(opened(base), base), wanted) > 5 * CLOSE


def test_a_dora_in_diffusers_layout_is_drawn_as_the_run_draws_it(toy: Path, tmp_path: Path):
    make_adapters(toy, tmp_path, 7, dora=True)
    shutil.move(tmp_path / WEIGHTS, tmp_path / "dora.safetensors")
    engine, subject = found(tmp_path / "dora.safetensors", toy)
    row = Row(subject, PROMPT, 1)
    assert not engine.shared(subject)
    assert np.array_equal(engine.draw([row], subject.sampling)[0], merged(row))


def test_adapters_of_no_layer_of_the_base_do_not_pass_for_a_subject(toy: Path, tmp_path: Path):
    names = {"of no part": "down_blocks.1.to_k.lora_magnitude_vector", "plain": "unet.down_blocks.7.to_k.lora_B.weight"}
    for stem, second in names.items():
        file = tmp_path / f"{stem.replace(' ', '-')}.safetensors"
        first = f"{second.partition('.lora_')[0]}.lora_A.weight"
        save_file({first: torch.ones(2, 32), second: torch.ones(32, 2)}, file)
        engine, subject = found(file, toy)
        with pytest.raises(RayboothError, match=f"'{file.stem}' cannot be loaded"):
            engine.draw([Row(subject, PROMPT, 1)], SAMPLING)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """The storage of a finished run."""
    return make_run(tmp_path_factory.mktemp("good") / "run", toy, 0)


def of_a_layer(*more: str) -> Tensors:
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(32, 2), **{f"{key}.{m}": torch.ones(32) for m in more}}


PEFTS = "base_model.model.down_blocks.0.attn.to_k."
USELESS: dict[str, tuple[Tensors, str]] = {
    "a checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "holds no LoRA"),
    "nothing": ({}, "holds no LoRA"),
    "a LoKr": ({"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)}, "holds no LoRA"),
    "kohya's DoRA": (of_a_layer("dora_scale"), "is a DoRA"),
    "PEFT's DoRA": ({f"{PEFTS}lora_A.weight": torch.ones(2, 4), f"{PEFTS}lora_magnitude_vector": torch.ones(4)}, "is a DoRA"),
    "a text encoder's DoRA": ({"text_encoder.q.lora_A.weight": torch.ones(2, 4), "text_encoder.q.lora_magnitude_vector": torch.ones(4)}, "is a DoRA"),
}


@pytest.mark.parametrize("what", USELESS)
def test_what_cannot_be_drawn_with_is_passed_over(good: Path, tmp_path: Path, what: str):
    tensors, told = USELESS[what]
    said: list[str] = []
    shutil.copytree(good, tmp_path / "good")
    save_file(tensors, tmp_path / "useless.safetensors")
    subjects = Subjects([str(tmp_path)], every=0, say=said.append)
    assert [set(subjects.found()) for _ in range(2)] == [{BASE, "good"}] * 2
    assert len(said) == 1
    assert told in said[0]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "header cut off": lambda data: data[:100],
    "half copied": lambda data: data[: len(data) // 2],
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 9,
    "no JSON": lambda data: (40).to_bytes(8, "little") + b"\xff" * 40,
}


@pytest.mark.parametrize("alone", [True, False], ids=["a file", "a run's"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_stops_nobody_and_is_found_when_it_is_whole(good: Path, tmp_path: Path, how: str, alone: bool):
    said: list[str] = []
    shutil.copytree(good, tmp_path / "good")
    whole = (good / "fine-tuned-model" / WEIGHTS).read_bytes()
    if not alone:
        shutil.copytree(good, tmp_path / "other")
    file = tmp_path / "other.safetensors" if alone else tmp_path / "other" / "fine-tuned-model" / WEIGHTS
    file.write_bytes(DAMAGE[how](whole))
    subjects = Subjects([str(tmp_path)], every=0, say=said.append)
    assert [set(subjects.found()) for _ in range(2)] == [{BASE, "good"}] * 2
    assert [line for line in said if "not readable as safetensors" in line] == said != []
    if alone:
        file.write_bytes(whole)
        assert set(subjects.found()) == {BASE, "good", "other"}


def test_what_was_trained_with_dropout_draws_without_and_equal_adapters_are_equal_files(toy: Path, tmp_path: Path):
    """diffusers would go on dropping at what a header names; and safetensors writes a header's texts in a random order."""
    family = family_of(toy)
    loaded = load(family, toy, family.trainable(True))
    add_adapters(family, loaded, family.trainable(True), Lora(rank=4, dropout=0.5), seed=0)
    for module in loaded.modules.values():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.05)
    files = set()
    for _ in range(8):
        save_adapters(family, loaded.modules, tmp_path)
        files.add((tmp_path / WEIGHTS).read_bytes())
    assert len(files) == 1
    pipe = opened(toy)
    plain = theirs(pipe, toy)
    pipe.load_lora_weights(tmp_path)
    first, second = theirs(pipe, toy), theirs(pipe, toy)
    assert apart(first, second) == 0
    assert apart(first, plain) > 0.01
