"""What CLIP is asked of a prompt: the token left out, and a sentence left over."""

import pytest

from raybooth.config import Config, load
from raybooth.dreambench import LIVE_PROMPTS, OBJECT_PROMPTS


def of(token: str, class_name: str) -> Config:
    return load(subject={"class": class_name, "token": token}, base={"model": "mini"})


@pytest.mark.parametrize("prompt", sorted({*OBJECT_PROMPTS, *LIVE_PROMPTS}))
def test_clip_is_asked_the_papers_prompts_without_the_token(prompt: str):
    config = of("sks", "dog")
    assert config.without_token(config.fill(prompt)) == prompt.replace("{subject}", "dog")


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("photo of {subject}", "photo of a dog"),
        ("{subject} at the desks", "a dog at the desks"),
        ("a {subject} in the snow", "a dog in the snow"),
        ("An {subject} in the snow", "A dog in the snow"),
        ("the {subject} on a sofa", "the dog on a sofa"),
        ("a red {subject}", "a red dog"),
        ("a sleeping {subject}", "a sleeping dog"),
        ("my friend's {subject}", "my friend's dog"),
        ("portrait, {subject}", "portrait, a dog"),
        ("photo of {token}, and {token} again", "photo of a dog, and a dog again"),
        ("a child with {subject}", "a child with a dog"),
        ("a photo at {subject}", "a photo at a dog"),
        ("a girl watching {subject}", "a girl watching a dog"),
        ("this is {subject}", "this is a dog"),
        ("a cat next to {subject}", "a cat next to a dog"),
        ("photo of {token}'s toys", "photo of a dog's toys"),
        ("photo of {token} dogs", "photo of dogs"),
        ("two {subject}s", "two dogs"),
        ("雪の中の{subject}", "雪の中のdog"),
        ("{subject}の写真", "a dogの写真"),
        ("海边的{token}在跑", "海边的dog在跑"),
        ("{subject}_in_snow", "a dog_in_snow"),
        ("photo of a {class} on sksế grass", "photo of a dog on sksế grass"),
        ("фото sksя {class}", "фото sksя dog"),
        ("photo of {token}  dog", "photo of a dog"),
        ("photo of {token}\ndog", "photo of a dog"),
        ("photo of {token}-dog", "photo of a dog"),
        ("photo of SKS Dog", "photo of a dog"),
        ("photo of a {class} on sksy grass", "photo of a dog on sksy grass"),
    ],
)
def test_the_class_stands_where_the_token_stood(prompt: str, asked: str):
    config = of("sks", "dog")
    assert config.without_token(config.fill(prompt)) == asked


@pytest.mark.parametrize(
    ("token", "class_name", "prompt", "asked"),
    [
        ("зва", "собака", "фото звание, {subject}", "фото звание, a собака"),
        ("<rex>", "dog", "portrait, {subject}", "portrait, a dog"),
        ("old rex", "dog", "the {subject} and an old rexine sofa", "the dog and an old rexine sofa"),
        ("sks", "apple", "photo of {subject}", "photo of an apple"),
        ("sks", "apple", "a {subject} on a table", "an apple on a table"),
        ("sks", "unicorn", "photo of {subject}", "photo of a unicorn"),
        ("sks", "toy car", "photo of {token} toy  car", "photo of a toy car"),
        ("sks", "puppy", "three {token} puppies", "three puppies"),
        ("sks", "bus", "photo of {token} buses", "photo of buses"),
    ],
)
def test_with_other_words_too(token: str, class_name: str, prompt: str, asked: str):
    config = of(token, class_name)
    assert config.without_token(config.fill(prompt)) == asked


def test_a_prompt_of_the_class_alone_shows_no_subject():
    config = of("sks", "dog")
    shown = {p: config.shows_subject(config.fill(p)) for p in ("{subject}", "photo of {token} at night", "a {class}", "a cat on sksy grass", "A Sks-dog")}
    assert shown == {"{subject}": True, "photo of {token} at night": True, "a {class}": False, "a cat on sksy grass": False, "A Sks-dog": True}
