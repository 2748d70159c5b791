"""How much of a prompt a model reads."""

from collections.abc import Iterable
from pathlib import Path

from raybooth.families import parts
from raybooth.families.base import Family
from raybooth.families.folder import read_index


def unread(family: Family, folder: Path, prompts: Iterable[str]) -> dict[str, tuple[int, str]]:
    """For each prompt that is too long for the model: how many tokens it reads, and the text that it does not see.

    Counted by the tokenizer of the encoder that reads furthest, which is opened only if a prompt may be too long.
    """
    length = family.facts(folder).text_length or family.conditioning(folder)["text"][0]
    long = [prompt for prompt in prompts if len(prompt.encode()) > length - 2]  # a byte may be a token; the start and end marks take two places
    if not long:
        return {}
    name = [part for part in family.settings if part.startswith("tokenizer")][-1]
    read, found = parts.tokenizer(folder, name, read_index(folder)), {}
    for prompt in long:
        ids = read(prompt, verbose=False).input_ids
        if len(ids) > length:  # the end mark takes the last place of what is read
            found[prompt] = length, read.decode(ids[length - 1 :], skip_special_tokens=True).strip()
    return found
